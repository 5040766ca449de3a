// TESSERA_SIMD before a function compiles it three times, for plain x86-64, AVX2 and AVX-512 machines, and picks at
// load time. Only code inside the function itself is multiplied: a lambda in it is not, so loops are written out.
// Results do not depend on the choice: the build switches off fused multiply-add (-ffp-contract=off).
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12
#define TESSERA_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define TESSERA_SIMD
#endif

// For what a TESSERA_SIMD function calls in its loops: it becomes part of each of the three versions.
#if defined(__GNUC__)
#define TESSERA_INLINE inline __attribute__((always_inline))
#else
#define TESSERA_INLINE inline
#endif
