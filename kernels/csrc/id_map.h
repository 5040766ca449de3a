// The id map on the state that kernels/id_map.py describes: how a key finds its slot.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <vector>

#include "mix.h"
#include "multiversion.h"

namespace tessera::id_map {

// As in kernels/reference/id_map.py.
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;
constexpr int64_t kSlots = 4096;
constexpr int64_t kLine = 4;
constexpr uint32_t kSegmentsPerChunk = 256;
constexpr int64_t kTableShift = 40;
constexpr int64_t kRowMask = (int64_t{1} << kTableShift) - 1;
constexpr int64_t kMostTables = int64_t{1} << 23;

constexpr int64_t kBlock = 64;  // ids hashed together

struct Slot {
  uint64_t hash;
  int64_t row;  // the table in the bits from kTableShift on, the row below; -1: empty
};

// Ids and the table of each, or of all of them where `tables` is null.
struct Keys {
  const int64_t* ids;
  const int64_t* tables;
  int64_t table;

  TESSERA_INLINE int64_t table_of(int64_t i) const { return tables == nullptr ? table : tables[i]; }
};

inline void check_table(int64_t table) {
  TORCH_CHECK_VALUE(table >= 0 && table < kMostTables, "tables: expected 0 to ", kMostTables - 1, ", found ", table);
}

TESSERA_SIMD inline void hash_ids(const int64_t* ids, int64_t n, uint64_t salt, uint64_t* hashes) {
  for (int64_t i = 0; i < n; ++i) hashes[i] = mix64(static_cast<uint64_t>(ids[i]) + kGolden) ^ salt;
}

// Hashes of the keys [begin, begin + n): the id's, moved by the table's, of which table 0 has none.
inline void hash_keys(const Keys& keys, int64_t begin, int64_t n, uint64_t* hashes) {
  hash_ids(keys.ids + begin, n, keys.tables == nullptr ? mix64(static_cast<uint64_t>(keys.table)) : 0, hashes);
  if (keys.tables == nullptr) return;
  for (int64_t i = 0; i < n; ++i) hashes[i] ^= mix64(static_cast<uint64_t>(keys.tables[begin + i]));
}

// A hash is looked for from the beginning of a cache line on, so that most searches see one line.
TESSERA_INLINE int64_t home_of(uint64_t hash) { return static_cast<int64_t>(hash & (kSlots - kLine)); }

// Where an id is looked for, and the segment in which the search goes round.
struct Place {
  Slot* segment;
  uint64_t hash;
  int64_t table;

  void prefetch() const { __builtin_prefetch(segment + home_of(hash), 1); }

  // The row of the key or -1. Lines fill from their beginning, so one with an empty last slot ends the search. The
  // slots of a line are compared by hash alone and without a branch that could be guessed wrong: all others contribute
  // -1 to the conjunction, which is all ones. The word of a single hit is then held to the table; to compare each
  // slot's table, too, took half as long again.
  int64_t row() const {
    for (int64_t at = home_of(hash);; at = (at + kLine) & (kSlots - 1)) {
      const Slot* const line = segment + at;
      int64_t found = -1, hits = 0;
      for (int64_t i = 0; i < kLine; ++i) {
        const int64_t other = -static_cast<int64_t>(line[i].hash != hash);
        found &= line[i].row | other;
        hits += other;
      }
      if (hits == -kLine && line[kLine - 1].row >= 0) continue;
      if (hits == -kLine) return -1;
      return hits == 1 - kLine && found >> kTableShift == table ? found & kRowMask : row_of_any();
    }
  }

  // `row` by comparing every slot with hash and table: for hashes that two tables have, and for emptied slots.
  __attribute__((noinline)) int64_t row_of_any() const {
    for (int64_t at = home_of(hash);; at = (at + kLine) & (kSlots - 1)) {
      const Slot* const line = segment + at;
      for (int64_t i = 0; i < kLine; ++i)
        if (line[i].hash == hash && line[i].row >> kTableShift == table) return line[i].row & kRowMask;
      if (line[kLine - 1].row < 0) return -1;
    }
  }

  // The slot of the hash, or the empty slot that ends its search: as many of a line are used as come before it.
  Slot* slot() const {
    for (int64_t at = home_of(hash);; at = (at + kLine) & (kSlots - 1)) {
      Slot* const line = segment + at;
      int64_t used = 0, found = -1;
      for (int64_t i = 0; i < kLine; ++i) {
        used += line[i].row >= 0;
        found &= i | -static_cast<int64_t>((line[i].hash != hash) | (line[i].row >> kTableShift != table));
      }
      if (found >= 0) return line + found;
      if (used < kLine) return line + used;
    }
  }
};

class Map {
 public:
  Map(const at::Tensor& directory, at::TensorList chunks)
      : directory_(directory.const_data_ptr<int32_t>()), size_(directory.numel()) {
    TORCH_CHECK_VALUE(directory.is_contiguous() && size_ > 0 && (size_ & (size_ - 1)) == 0,
                      "directory: expected a power of two entries");
    while ((int64_t{1} << bits_) < size_) ++bits_;
    chunks_.reserve(chunks.size());
    for (const at::Tensor& chunk : chunks) {
      TORCH_CHECK_VALUE(chunk.is_contiguous() && chunk.numel() == kSegmentsPerChunk * kSlots * 2,
                        "chunks: expected [", kSegmentsPerChunk, ", ", kSlots, ", 2], found ", chunk.sizes());
      chunks_.push_back(reinterpret_cast<Slot*>(chunk.data_ptr<int64_t>()));
    }
  }

  int64_t bits() const { return bits_; }
  int32_t segment_of(uint64_t hash) const { return directory_[(hash >> 1) >> (63 - bits_)]; }
  Slot* slots_of(uint32_t segment) const {
    return chunks_[segment / kSegmentsPerChunk] + (segment % kSegmentsPerChunk) * kSlots;
  }
  Place place(uint64_t hash, int64_t table) const { return {slots_of(segment_of(hash)), hash, table}; }

 private:
  const int32_t* directory_;
  int64_t size_;
  int64_t bits_ = 0;
  std::vector<Slot*> chunks_;
};

}  // namespace tessera::id_map
