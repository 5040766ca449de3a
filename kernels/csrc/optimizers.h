// The optimizers of kernels/update.py, one row at a time: w are its values, s its state, g its merged gradient.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "chunks.h"
#include "multiversion.h"

namespace tessera {

// Bias corrections of Adam for the steps t = 1, 2, ... of a row, kept from call to call: computing the powers for
// every row would take longer than its update.
class Corrections {
 public:
  struct Factors {
    double rest1;  // 1 - beta1^t
    float root2;   // sqrt(1 - beta2^t)
  };

  static const Corrections& of(double beta1, double beta2) {
    thread_local Corrections last;
    if (last.table_.empty() || last.beta1_ != beta1 || last.beta2_ != beta2) last = Corrections(beta1, beta2);
    return last;
  }

  Factors at(float t) const {
    if (t >= 1 && t <= static_cast<float>(table_.size())) return table_[static_cast<size_t>(t) - 1];
    return factors(std::pow(beta1_, t), std::pow(beta2_, t));
  }

 private:
  Corrections() = default;
  Corrections(double beta1, double beta2) : beta1_(beta1), beta2_(beta2) {
    constexpr int kMost = 1 << 15;
    double power1 = 1, power2 = 1;
    for (int t = 1; t <= kMost; ++t) table_.push_back(factors(power1 *= beta1, power2 *= beta2));
  }

  static Factors factors(double power1, double power2) {
    return {1 - power1, static_cast<float>(std::sqrt(1 - power2))};
  }

  double beta1_ = 0, beta2_ = 0;
  std::vector<Factors> table_;
};

// In the order of OPTIMIZERS in kernels/optimizers.py.
enum class Kind : int64_t { kSgd, kAdagrad, kRowwiseAdagrad, kAdam, kFtrl };

inline Kind kind_of(int64_t number) {
  TORCH_CHECK_VALUE(number >= 0 && number <= static_cast<int64_t>(Kind::kFtrl), "optimizer: unknown number ", number);
  return static_cast<Kind>(number);
}

// The numbers of OptimizerSettings in kernels/optimizers.py, as the optimizers use them.
struct Hyper {
  float learning_rate, weight_decay, eps, beta1, beta2, rest1, rest2, beta, l1, l2;
  float start;        // ftrl: -z / w of an element without gradients so far
  double exact_rate;  // learning_rate in float64
  float gradient_scale;
  const Corrections& corrections;

  static Hyper of(at::ArrayRef<double> s) {
    TORCH_CHECK_VALUE(!s.empty(), "settings: expected 9 numbers, found 0");
    return of(s, s[0]);
  }

  static Hyper of(at::ArrayRef<double> s, double learning_rate) {
    TORCH_CHECK_VALUE(s.size() == 9, "settings: expected 9 numbers, found ", s.size());
    return {learning_rate, s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]};
  }

 private:
  Hyper(double learning_rate, double weight_decay, double eps, double beta1, double beta2, double beta, double l1,
        double l2, double gradient_scale)
      : learning_rate(static_cast<float>(learning_rate)),
        weight_decay(static_cast<float>(weight_decay)),
        eps(static_cast<float>(eps)),
        beta1(static_cast<float>(beta1)),
        beta2(static_cast<float>(beta2)),
        rest1(static_cast<float>(1 - beta1)),
        rest2(static_cast<float>(1 - beta2)),
        beta(static_cast<float>(beta)),
        l1(static_cast<float>(l1)),
        l2(static_cast<float>(l2)),
        start(static_cast<float>(beta / learning_rate + l2)),
        exact_rate(learning_rate),
        gradient_scale(static_cast<float>(gradient_scale)),
        corrections(Corrections::of(beta1, beta2)) {}
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
    const Corrections::Factors now = h.corrections.at(s[2 * dim]);
    const auto rate = static_cast<float>(h.exact_rate / now.rest1);
    for (int64_t c = 0; c < dim; ++c) {
      const float grad = g[c] + h.weight_decay * w[c];
      m[c] += h.rest1 * (grad - m[c]);
      v[c] = v[c] * h.beta2 + h.rest2 * grad * grad;
      w[c] -= rate * m[c] / (std::sqrt(v[c]) / now.root2 + h.eps);
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
      const float solved = -shrunk / ((h.beta + std::sqrt(grown)) / h.learning_rate + h.l2);
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
