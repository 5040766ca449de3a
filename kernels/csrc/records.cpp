// The fused optimizer step on records: gradients of a row are summed, all groups stepped, all written.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "decay.h"
#include "decode_record.h"
#include "optimizers.h"
#include "quantise.h"
#include "random.h"
#include "records.h"

namespace {

using tessera::Decay;
using tessera::Fault;
using tessera::Format;
using tessera::GroupLayout;
using tessera::Hyper;
using tessera::kAhead;
using tessera::kBlock;
using tessera::Kind;
using tessera::Layout;
using tessera::Meta;
using tessera::RecordLayout;
using tessera::Records;

// Gradients of the rows of a batch: those of row r are at order[begins[r]] to order[begins[r + 1] - 1], or without an
// order at r.
struct Gradients {
  const float* grads;
  const int64_t* order;
  const int64_t* begins;
  int64_t n;

  TESSERA_INLINE bool wrong(int64_t position) const {
    return __builtin_expect(static_cast<uint64_t>(position) >= static_cast<uint64_t>(n), 0);
  }
  Fault fault(int64_t position) const { return {"order", position, n}; }

  // Ask for the gradient of a place of `order` that is needed soon, if there is such a place.
  TESSERA_INLINE void prefetch(int64_t place, int64_t width) const {
    if (place >= n || wrong(order[place])) return;
    const char* const at = reinterpret_cast<const char*>(grads + order[place] * width);
    for (int64_t offset = 0; offset < std::min(4 * width, tessera::kMostAhead); offset += 64) __builtin_prefetch(at + offset);
    __builtin_prefetch(at + 4 * width - 1);
  }
};

struct Update {
  const Records& records;
  const RecordLayout& layout;
  const int64_t* rows;
  Gradients given;
  const std::vector<Hyper>& hypers;  // of each table
  const int64_t* keys;               // [tables, groups, 2]
  int64_t step, mark;
  Decay decay;
  double power;  // of a row's count, by which its exponent of decay falls

  int64_t table_of(const char* record) const {
    const int64_t table = reinterpret_cast<const Meta*>(record + layout.meta_at)->table();
    return std::min(table, static_cast<int64_t>(hypers.size()) - 1);
  }
};

// What a block of rows needs at hand. A row without a record has none, and is skipped.
struct Block {
  int64_t size;
  char* records[kBlock];
  const float* grads[kBlock];  // of all groups
  int64_t tables[kBlock];
  float kept[kBlock];  // of values, where tables decay
};

// Sum the gradients at order[from] to order[to - 1], in this order. Sums of a width known while compiling stay in
// registers.
template <int64_t Width>
TESSERA_INLINE Fault add_up(const Gradients& given, int64_t width, int64_t from, int64_t to, float* __restrict sum) {
  float registers[Width > 0 ? Width : 1];
  float* __restrict const to_sum = Width > 0 ? registers : sum;
  const int64_t columns = Width > 0 ? Width : width;
  for (int64_t c = 0; c < columns; ++c) to_sum[c] = 0.0f;
  for (int64_t p = from; p < to; ++p) {
    given.prefetch(p + kAhead, columns);
    const int64_t position = given.order[p];
    if (given.wrong(position)) return given.fault(position);
    const float* __restrict const grad = given.grads + position * columns;
    if (p == from)  // not added to zero, which would lose the sign of a gradient -0
      for (int64_t c = 0; c < columns; ++c) to_sum[c] = grad[c];
    else
      for (int64_t c = 0; c < columns; ++c) to_sum[c] += grad[c];
  }
  if (Width > 0)
    for (int64_t c = 0; c < columns; ++c) sum[c] = to_sum[c];
  return {};
}

// Sum the gradients of rows [begin, begin + block.size), in order of position; a row's only gradient is not copied.
template <int64_t Width>
TESSERA_INLINE Fault sum_rows(const Update& update, int64_t begin, int64_t last, float* sums, Block& block) {
  const int64_t width = Width > 0 ? Width : update.layout.width;
  const Gradients& given = update.given;
  for (int64_t k = 0; k < block.size; ++k) {
    const int64_t i = begin + k, row = update.rows[i];
    if (i + kAhead < last) update.records.prefetch(update.rows[i + kAhead], 0, update.layout.bytes);
    if (update.records.beyond(row)) return update.records.fault(row);
    block.records[k] = row < 0 ? nullptr : update.records[row];
    if (given.order == nullptr) {
      block.grads[k] = given.grads + i * width;
      continue;
    }
    const int64_t from = given.begins[i], to = given.begins[i + 1];
    if (from < 0 || to > given.n) return given.fault(to);
    if (to == from + 1) {
      given.prefetch(from + kAhead, width);
      if (given.wrong(given.order[from])) return given.fault(given.order[from]);
      block.grads[k] = given.grads + given.order[from] * width;
      continue;
    }
    float* const sum = sums + k * width;
    if (const Fault fault = add_up<Width>(given, width, from, to, sum); fault.name != nullptr) return fault;
    block.grads[k] = sum;
  }
  return {};
}

TESSERA_SIMD Fault sum_block(const Update& update, int64_t begin, int64_t last, float* sums, Block& block) {
  switch (update.layout.width) {
    case 8: return sum_rows<8>(update, begin, last, sums, block);
    case 16: return sum_rows<16>(update, begin, last, sums, block);
    case 17: return sum_rows<17>(update, begin, last, sums, block);
    case 32: return sum_rows<32>(update, begin, last, sums, block);
    case 33: return sum_rows<33>(update, begin, last, sums, block);
    default: return sum_rows<0>(update, begin, last, sums, block);
  }
}

// Note which tables the rows of a block belong to, and what decay has left of their values.
TESSERA_SIMD void read_meta(const Update& update, Block& block) {
  for (int64_t k = 0; k < block.size; ++k) {
    const char* const record = block.records[k];
    block.tables[k] = record == nullptr ? 0 : update.table_of(record);
    if (update.decay.sums != nullptr && record != nullptr) block.kept[k] = update.decay.factor_of(record);
  }
}

// Where a group's values and state are while a block is stepped: in the records, or taken out of packed rows.
struct Opened {
  float* values[kBlock];  // null: skipped
  float* state[kBlock];
};

void open_plain(const GroupLayout& group, const Block& block, Opened& opened) {
  for (int64_t k = 0; k < block.size; ++k) {
    char* const record = block.records[k];
    opened.values[k] = record == nullptr ? nullptr : reinterpret_cast<float*>(group.row.values_of(record));
    opened.state[k] = record == nullptr ? nullptr : group.row.state_of(record);
  }
}

// memory: float32 [kBlock, dim], then [kBlock, moments + 1] where the state is bf16 moments and a count.
TESSERA_SIMD void open_packed(const GroupLayout& group, const Block& block, float* memory, Opened& opened) {
  const Layout& layout = group.row;
  float* const states = memory + kBlock * layout.dim;
  for (int64_t k = 0; k < block.size; ++k) {
    opened.values[k] = nullptr;
    if (block.records[k] == nullptr) continue;
    char* const row = block.records[k] + group.begin;
    opened.values[k] = memory + k * layout.dim;
    tessera::decode_row(group, block.records[k], opened.values[k]);
    opened.state[k] = layout.moments == 0 ? layout.state_of(row) : states + k * (layout.moments + 1);
    if (layout.moments == 0) continue;
    const auto* const moments = reinterpret_cast<const uint8_t*>(row) + layout.moments_at;
    tessera::decode<Format::kBf16>(moments, 1, layout.moments, opened.state[k]);
    opened.state[k][layout.moments] = *layout.state_of(row);
  }
}

TESSERA_SIMD void close_packed(const Update& update, int64_t number, const Block& block, const Opened& opened) {
  const GroupLayout& group = update.layout.groups[number];
  const Layout& layout = group.row;
  const int64_t groups = static_cast<int64_t>(update.layout.groups.size());
  for (int64_t k = 0; k < block.size; ++k) {
    if (block.records[k] == nullptr) continue;
    char* const row = block.records[k] + group.begin;
    const auto& meta = *reinterpret_cast<const Meta*>(block.records[k] + update.layout.meta_at);
    const int64_t base = update.keys[(block.tables[k] * groups + number) * 2 + 1];
    const uint64_t key = tessera::random_row(tessera::stream_at(base, update.step), meta.id);
    tessera::encode_as(layout.format, layout.nearest, opened.values[k], layout.scale_of(row), key, layout.dim,
                       layout.values_of(row));
    if (layout.moments == 0) continue;
    // Always stochastic, and after the draws of the values: as in packed.cpp.
    tessera::encode<Format::kBf16, false>(opened.state[k], 1, key, layout.moments,
                                          reinterpret_cast<uint8_t*>(row) + layout.moments_at, layout.dim);
    *layout.state_of(row) = opened.state[k][layout.moments];
  }
}

template <typename Step, int64_t Dim>
TESSERA_INLINE void step_rows_of(const GroupLayout& group, const Block& block, const Opened& opened, const Hyper* hypers) {
  const int64_t dim = Dim > 0 ? Dim : group.row.dim;
  for (int64_t k = 0; k < block.size; ++k)
    if (opened.values[k] != nullptr)
      Step::template step<Dim>(opened.values[k], opened.state[k], block.grads[k] + group.column, dim, hypers[block.tables[k]]);
}

template <typename Step>
TESSERA_INLINE void step_rows(const GroupLayout& group, const Block& block, const Opened& opened, const Hyper* hypers) {
  switch (group.row.dim) {
    case 1: return step_rows_of<Step, 1>(group, block, opened, hypers);
    case 8: return step_rows_of<Step, 8>(group, block, opened, hypers);
    case 16: return step_rows_of<Step, 16>(group, block, opened, hypers);
    case 32: return step_rows_of<Step, 32>(group, block, opened, hypers);
    default: return step_rows_of<Step, 0>(group, block, opened, hypers);
  }
}

TESSERA_SIMD void step_block(const GroupLayout& group, const Block& block, const Opened& opened, const Hyper* hypers) {
  switch (group.row.optimizer) {
    case Kind::kSgd: return step_rows<tessera::Sgd>(group, block, opened, hypers);
    case Kind::kAdagrad: return step_rows<tessera::Adagrad>(group, block, opened, hypers);
    case Kind::kRowwiseAdagrad: return step_rows<tessera::RowwiseAdagrad>(group, block, opened, hypers);
    case Kind::kAdam: return step_rows<tessera::Adam>(group, block, opened, hypers);
    default: return step_rows<tessera::Ftrl>(group, block, opened, hypers);
  }
}

// Let values keep what steps without gradients have left of them, and this one.
TESSERA_SIMD void decay_block(const GroupLayout& group, const Block& block, const Opened& opened, float l1) {
  const bool ftrl = group.row.optimizer == Kind::kFtrl;
  for (int64_t k = 0; k < block.size; ++k) {
    if (opened.values[k] == nullptr) continue;
    tessera::decay_row(opened.values[k], ftrl ? opened.state[k] : nullptr, group.row.dim, block.kept[k], l1);
  }
}

void step_groups(const Update& update, const Block& block, float* memory) {
  const std::vector<GroupLayout>& groups = update.layout.groups;
  for (size_t number = 0; number < groups.size(); ++number) {
    const GroupLayout& group = groups[number];
    Opened opened;
    group.plain() ? open_plain(group, block, opened) : open_packed(group, block, memory, opened);
    if (update.decay.sums != nullptr) decay_block(group, block, opened, update.hypers[0].l1);
    step_block(group, block, opened, update.hypers.data());
    if (!group.plain()) close_packed(update, static_cast<int64_t>(number), block, opened);
  }
}

void set_marks(const Block& block, const Update& update) {
  for (int64_t k = 0; k < block.size; ++k) {
    if (block.records[k] == nullptr) continue;
    auto& word = reinterpret_cast<Meta*>(block.records[k] + update.layout.meta_at)->table_and_mark;
    word = (word & tessera::kTableBits) | update.mark << 32;
  }
}

void set_decayed(const Block& block, const Update& update) {
  for (int64_t k = 0; k < block.size; ++k)
    if (block.records[k] != nullptr) update.decay.set(block.records[k], update.power);
}

void update_range(const Update& update, int64_t first, int64_t last) {
  int64_t most = 0;
  for (const GroupLayout& group : update.layout.groups) most = std::max(most, group.row.dim + group.row.moments + 1);
  std::vector<float> memory(kBlock * (update.layout.width + most));
  for (int64_t i = first; i < std::min(last, first + kAhead); ++i)
    update.records.prefetch(update.rows[i], 0, update.layout.bytes);
  for (int64_t begin = first; begin < last; begin += kBlock) {
    Block block;
    block.size = std::min(kBlock, last - begin);
    sum_block(update, begin, last, memory.data(), block).raise();
    read_meta(update, block);
    step_groups(update, block, memory.data() + kBlock * update.layout.width);
    if (update.mark > 0) set_marks(block, update);
    if (update.decay.sums != nullptr) set_decayed(block, update);
  }
}

void records_update(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& grads_,
                    const std::optional<at::Tensor>& order_, const std::optional<at::Tensor>& begins_,
                    const at::Tensor& keys_, const at::Tensor& rates_, at::IntArrayRef numbers,
                    at::ArrayRef<double> settings, int64_t step, int64_t mark,
                    const std::optional<at::Tensor>& decayed, double power) {
  const RecordLayout layout(numbers);
  const Records records(chunks, layout);
  const at::Tensor rows = rows_.contiguous(), grads = grads_.contiguous(), keys = keys_.contiguous();
  const int64_t count = rows.numel(), n = grads.size(0), groups = static_cast<int64_t>(layout.groups.size());
  TORCH_CHECK_VALUE(grads.dim() == 2 && grads.size(1) == layout.width, "grads: expected [n, ", layout.width, "]");
  TORCH_CHECK_VALUE(order_.has_value() == begins_.has_value(), "order: expected with begins");
  const at::Tensor rates = rates_.contiguous();
  TORCH_CHECK_VALUE(rates.numel() > 0 && keys.numel() == 2 * groups * rates.numel(), "keys: expected [tables, ", groups, ", 2]");
  const at::Tensor order = order_.has_value() ? order_->contiguous() : at::Tensor();
  const at::Tensor begins = begins_.has_value() ? begins_->contiguous() : at::Tensor();
  TORCH_CHECK_VALUE(order.defined() ? order.numel() == n && begins.numel() == count + 1 : n == count,
                    "grads: expected as many as positions");
  std::vector<Hyper> hypers;
  for (int64_t t = 0; t < rates.numel(); ++t) hypers.push_back(Hyper::of(settings, rates.const_data_ptr<double>()[t]));
  const Update update{records,
                      layout,
                      rows.const_data_ptr<int64_t>(),
                      {grads.const_data_ptr<float>(), order.defined() ? order.const_data_ptr<int64_t>() : nullptr,
                       begins.defined() ? begins.const_data_ptr<int64_t>() : nullptr, n},
                      hypers,
                      keys.const_data_ptr<int64_t>(),
                      step,
                      mark,
                      Decay(decayed, layout),
                      power};
  at::parallel_for(0, count, tessera::grain_of(layout), [&](int64_t begin, int64_t end) { update_range(update, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) { m.impl("records_update", &records_update); }
