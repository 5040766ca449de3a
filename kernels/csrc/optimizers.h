// The optimizers of kernels/update.py, one row at a time: w are its values, s its state, g its merged gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "chunks.h"
#include "multiversion.h"

namespace tessera {

struct Hyper {
  float learning_rate, weight_decay, eps, beta1, beta2, rest1, rest2, l1;
  float start;   // ftrl: beta / learning_rate + l2
  float offset;  // ftrl: beta
  float l2;
  double exact_rate, exact_beta1, exact_beta2;
  struct Correction {
    float rate;  // learning_rate / (1 - beta1^t)
    float root;  // sqrt(1 - beta2^t)
  };
  std::vector<Correction> corrections;  // adam: of the steps t = 1, 2, ...

  Hyper(double learning_rate, double weight_decay, double eps, double beta1, double beta2, double beta, double l1,
        double l2, bool corrected)
      : learning_rate(static_cast<float>(learning_rate)),
        weight_decay(static_cast<float>(weight_decay)),
        eps(static_cast<float>(eps)),
        beta1(static_cast<float>(beta1)),
        beta2(static_cast<float>(beta2)),
        rest1(static_cast<float>(1 - beta1)),
        rest2(static_cast<float>(1 - beta2)),
        l1(static_cast<float>(l1)),
        start(static_cast<float>(beta / learning_rate + l2)),
        offset(static_cast<float>(beta)),
        l2(static_cast<float>(l2)),
        exact_rate(learning_rate),
        exact_beta1(beta1),
        exact_beta2(beta2) {
    if (!corrected) return;
    constexpr int kMost = 1 << 12;
    corrections.reserve(kMost);
    double power1 = 1, power2 = 1;
    for (int t = 1; t <= kMost; ++t) {
      power1 *= beta1;
      power2 *= beta2;
      corrections.push_back(correction(power1, power2));
    }
  }

  Correction correction(double power1, double power2) const {
    return {static_cast<float>(exact_rate / (1 - power1)), static_cast<float>(std::sqrt(1 - power2))};
  }

  Correction correction_of(float t) const {
    if (t <= static_cast<float>(corrections.size())) return corrections[static_cast<size_t>(t) - 1];
    return correction(std::pow(exact_beta1, t), std::pow(exact_beta2, t));
  }
};

struct Steps {
  const Rows<float>& table;
  const int64_t* rows;
  const float* grads;
  int64_t dim;
  const Hyper& hyper;
};

struct Sgd {
  template <int64_t Dim>
  static TESSERA_INLINE void step(float* __restrict w, float*, const float* __restrict g, int64_t dim, const Hyper& h) {
    for (int64_t c = 0; c < (Dim > 0 ? Dim : dim); ++c) w[c] -= h.learning_rate * (g[c] + h.weight_decay * w[c]);
  }
};

struct Adagrad {
  template <int64_t Dim>
  static TESSERA_INLINE void step(float* __restrict w, float* __restrict s, const float* __restrict g, int64_t dim,
                                  const Hyper& h) {
    for (int64_t c = 0; c < (Dim > 0 ? Dim : dim); ++c) {
      const float grad = g[c] + h.weight_decay * w[c];
      s[c] += grad * grad;
      w[c] -= h.learning_rate * grad / (std::sqrt(s[c]) + h.eps);
    }
  }
};

struct RowwiseAdagrad {
  template <int64_t Dim>
  static TESSERA_INLINE void step(float* __restrict w, float* __restrict s, const float* __restrict g, int64_t dim_,
                                  const Hyper& h) {
    constexpr int64_t kLanes = 8;  // sums kept apart, so that they fit a vector register and the order is fixed
    const int64_t dim = Dim > 0 ? Dim : dim_;
    float lanes[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float grad = g[c + lane] + h.weight_decay * w[c + lane];
        lanes[lane] += grad * grad;
      }
    for (; c < dim; ++c) {
      const float grad = g[c] + h.weight_decay * w[c];
      lanes[c % kLanes] += grad * grad;
    }
    const float sum = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    s[0] += sum / static_cast<float>(dim);
    const float rate = h.learning_rate / (std::sqrt(s[0]) + h.eps);
    for (c = 0; c < dim; ++c) w[c] -= rate * (g[c] + h.weight_decay * w[c]);
  }
};

struct Adam {
  template <int64_t Dim>
  static TESSERA_INLINE void step(float* __restrict w, float* __restrict s, const float* __restrict g, int64_t dim_,
                                  const Hyper& h) {
    const int64_t dim = Dim > 0 ? Dim : dim_;
    float* __restrict const m = s;
    float* __restrict const v = s + dim;
    s[2 * dim] += 1;
    const Hyper::Correction now = h.correction_of(s[2 * dim]);
    for (int64_t c = 0; c < dim; ++c) {
      const float grad = g[c] + h.weight_decay * w[c];
      m[c] += h.rest1 * (grad - m[c]);
      v[c] = v[c] * h.beta2 + h.rest2 * grad * grad;
      w[c] -= now.rate * m[c] / (std::sqrt(v[c]) / now.root + h.eps);
    }
  }
};

struct Ftrl {
  template <int64_t Dim>
  static TESSERA_INLINE void step(float* __restrict w, float* __restrict s, const float* __restrict g, int64_t dim_,
                                  const Hyper& h) {
    const int64_t dim = Dim > 0 ? Dim : dim_;
    float* __restrict const z = s;
    float* __restrict const n = s + dim;
    for (int64_t c = 0; c < dim; ++c) {
      const float grad = g[c] + h.weight_decay * w[c];
      const float start = -w[c] * h.start - std::copysign(w[c] == 0 ? 0.0f : h.l1, w[c]);
      const float grown = n[c] + grad * grad;
      const float sigma = (std::sqrt(grown) - std::sqrt(n[c])) / h.learning_rate;
      const float next = (n[c] == 0 ? start : z[c]) + (grad - sigma * w[c]);
      const float shrunk = next - std::copysign(h.l1, next);
      const float solved = -shrunk / ((h.offset + std::sqrt(grown)) / h.learning_rate + h.l2);
      z[c] = next;
      n[c] = grown;
      w[c] = std::fabs(next) <= h.l1 ? 0.0f : solved;
    }
  }
};

template <typename Step, int64_t Dim>
TESSERA_INLINE Fault step_rows_of(const Steps& steps, int64_t begin, int64_t end) {
  const int64_t dim = Dim > 0 ? Dim : steps.dim;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) steps.table.prefetch(steps.rows[i + kAhead], steps.table.width * 4);
    if (steps.table.beyond(steps.rows[i])) return steps.table.fault(steps.rows[i]);
    if (steps.rows[i] < 0) continue;
    float* const row = steps.table[steps.rows[i]];
    Step::template step<Dim>(row, row + dim, steps.grads + i * dim, dim, steps.hyper);
  }
  return {};
}

// Widths known while compiling are unrolled into a few vector instructions.
template <typename Step>
TESSERA_INLINE Fault step_rows(const Steps& steps, int64_t begin, int64_t end) {
  switch (steps.dim) {
    case 8: return step_rows_of<Step, 8>(steps, begin, end);
    case 16: return step_rows_of<Step, 16>(steps, begin, end);
    case 32: return step_rows_of<Step, 32>(steps, begin, end);
    default: return step_rows_of<Step, 0>(steps, begin, end);
  }
}

}  // namespace tessera
