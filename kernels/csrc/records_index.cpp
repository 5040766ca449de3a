// Finding the records of ids of many tables, noting that they were seen, and writing new ones.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "id_map.h"
#include "quantise.h"
#include "random.h"
#include "records.h"

namespace {

using namespace tessera::id_map;
using tessera::Fault;
using tessera::GroupLayout;
using tessera::kAhead;
using tessera::Meta;
using tessera::RecordLayout;
using tessera::Records;

constexpr int64_t kGrain = 1 << 12;  // ids per thread below which another thread does not pay

// Ids of table t are at bounds[t] to bounds[t + 1] - 1.
struct Asked {
  const int64_t* ids;
  const int64_t* bounds;
  int64_t tables;

  // The table of position i, which is `from` or a later one.
  int64_t table_of(int64_t i, int64_t from) const {
    while (bounds[from + 1] <= i) ++from;
    return from;
  }
};

void check_bounds(const at::Tensor& bounds, int64_t ids) {
  const int64_t* const b = bounds.const_data_ptr<int64_t>();
  const int64_t tables = bounds.numel() - 1;
  TORCH_CHECK_VALUE(tables >= 1 && tables <= kMostTables && b[0] == 0 && b[tables] == ids,
                    "bounds: expected int64 from 0 to ", ids);
  for (int64_t t = 0; t < tables; ++t)
    TORCH_CHECK_VALUE(b[t] <= b[t + 1], "bounds: expected ascending, found ", b[t], " before ", b[t + 1]);
}

struct Seen {
  const int64_t* times;  // null: nothing is noted
  int64_t time_step;     // 0: one time for all
  const int64_t* counts;  // null: 1 each

  void note(Meta& meta, int64_t i) const {
    const int64_t time = times[i * time_step];
    meta.last_seen = meta.count == 0 ? time : std::max(meta.last_seen, time);
    meta.count += counts == nullptr ? 1 : counts[i];
  }
};

// A block of ids on its way: its slots are asked for, then its records, then they are noted as seen, each while the
// blocks after it are a stage behind.
struct Block {
  int64_t begin = 0, size = 0;
  Place places[kBlock];
  Meta* metas[kBlock];
};

class Search {
 public:
  Search(const Map& map, const Records& records, const Asked& asked, const Seen& seen, int64_t* rows)
      : map_(map), records_(records), asked_(asked), seen_(seen), rows_(rows) {}

  void run(int64_t first, int64_t last) const {
    if (first == last) return;
    Block blocks[3];
    int64_t table = std::upper_bound(asked_.bounds, asked_.bounds + asked_.tables + 1, first) - asked_.bounds - 1;
    for (int64_t turn = 0, begin = first; begin < last + 2 * kBlock; ++turn, begin += kBlock) {
      if (begin < last) table = ask(blocks[turn % 3], begin, std::min(kBlock, last - begin), table);
      if (turn >= 1 && begin - kBlock < last) find(blocks[(turn - 1) % 3]);
      if (turn >= 2 && seen_.times != nullptr) note(blocks[(turn - 2) % 3]);
    }
  }

 private:
  int64_t ask(Block& block, int64_t begin, int64_t size, int64_t table) const {
    uint64_t hashes[kBlock];
    block.begin = begin, block.size = size;
    hash_ids(asked_.ids + begin, size, 0, hashes);
    for (int64_t i = 0; i < size;) {
      table = asked_.table_of(begin + i, table);
      const uint64_t salt = tessera::mix64(static_cast<uint64_t>(table));
      const int64_t end = std::min(size, asked_.bounds[table + 1] - begin);
      for (; i < end; ++i) {
        block.places[i] = map_.place(hashes[i] ^ salt, table);
        block.places[i].prefetch();
      }
    }
    return table;
  }

  void find(Block& block) const {
    for (int64_t i = 0; i < block.size; ++i) {
      const int64_t row = block.places[i].row();
      rows_[block.begin + i] = row;
      if (seen_.times == nullptr) continue;
      if (records_.beyond(row)) records_.fault(row).raise();
      block.metas[i] = row < 0 ? nullptr : records_.meta(row);
      if (row >= 0) __builtin_prefetch(block.metas[i], 1);
    }
  }

  void note(const Block& block) const {
    for (int64_t i = 0; i < block.size; ++i)
      if (block.metas[i] != nullptr) seen_.note(*block.metas[i], block.begin + i);
  }

  const Map& map_;
  const Records& records_;
  const Asked& asked_;
  const Seen& seen_;
  int64_t* rows_;
};

at::Tensor records_find(const at::Tensor& directory, at::TensorList map_chunks, at::TensorList chunks,
                        const at::Tensor& ids_, const at::Tensor& bounds_, const std::optional<at::Tensor>& now_,
                        const std::optional<at::Tensor>& counts_, at::IntArrayRef numbers) {
  const RecordLayout layout(numbers);
  const Records records(chunks, layout);
  const Map map(directory, map_chunks);
  const at::Tensor ids = ids_.contiguous(), bounds = bounds_.contiguous();
  const at::Tensor now = now_.has_value() ? now_->contiguous() : at::Tensor();
  const at::Tensor counts = counts_.has_value() ? counts_->contiguous() : at::Tensor();
  const int64_t n = ids.numel();
  check_bounds(bounds, n);
  TORCH_CHECK_VALUE(!now.defined() || now.numel() == 1 || now.numel() == n, "now: expected 1 or ", n, " times");
  TORCH_CHECK_VALUE(!counts.defined() || counts.numel() == n, "counts: expected ", n, ", found ", counts.numel());
  at::Tensor rows = at::empty({n}, ids.options());
  const Asked asked{ids.const_data_ptr<int64_t>(), bounds.const_data_ptr<int64_t>(), bounds.numel() - 1};
  const Seen seen{now.defined() ? now.const_data_ptr<int64_t>() : nullptr, now.defined() && now.numel() > 1,
                  counts.defined() ? counts.const_data_ptr<int64_t>() : nullptr};
  const Search search(map, records, asked, seen, rows.mutable_data_ptr<int64_t>());
  at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) { search.run(begin, end); });
  return rows;
}

// ---- new records

struct Start {
  const Records& records;
  const RecordLayout& layout;
  const int64_t* rows;
  const int64_t* ids;
  const int64_t* tables;
  Seen seen;
  const int64_t* keys;  // [tables, groups, 2]: the stream of first values, and the base of that of rounding
  const float* stds;    // [tables, groups]
  const double* scales;  // [groups]
  int64_t most_tables;
  float accumulator;
  int64_t mark;
};

TESSERA_INLINE void draw_values(uint64_t stream, int64_t id, int64_t dim, float std, float* out) {
  tessera::normal_row(tessera::random_row(stream, id), dim, out);
  for (int64_t c = 0; c < dim; ++c) out[c] = 0.0f + std * out[c];
}

// scratch: float32 [dim of the widest group].
TESSERA_SIMD void write_group(const Start& start, int64_t i, int64_t number, char* record, float* scratch) {
  const GroupLayout& group = start.layout.groups[number];
  const tessera::Layout& layout = group.row;
  const int64_t place = start.tables[i] * static_cast<int64_t>(start.layout.groups.size()) + number;
  const auto stream = static_cast<uint64_t>(start.keys[2 * place]);
  char* const row = record + group.begin;
  std::fill_n(layout.state_of(row), layout.state_floats, start.accumulator);
  if (group.plain()) {
    auto* const values = reinterpret_cast<float*>(layout.values_of(row));
    if (start.stds[place] != 0) draw_values(stream, start.ids[i], layout.dim, start.stds[place], values);
    return;
  }
  tessera::normal_row(tessera::random_row(stream, start.ids[i]), layout.dim, scratch);
  for (int64_t c = 0; c < layout.dim; ++c) scratch[c] *= start.stds[place];
  if (tessera::is_int(layout.format)) *reinterpret_cast<float*>(row) = static_cast<float>(start.scales[number]);
  const uint64_t key = tessera::random_row(tessera::stream_at(start.keys[2 * place + 1], 0), start.ids[i]);
  tessera::encode_as(layout.format, layout.nearest, scratch, layout.scale_of(row), key, layout.dim,
                     layout.values_of(row));
}

void write_records(const Start& start, int64_t begin, int64_t end) {
  std::vector<float> scratch(start.layout.width);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) start.records.prefetch(start.rows[i + kAhead], 0, start.layout.bytes);
    const int64_t row = start.rows[i], table = start.tables[i];
    if (start.records.beyond(row)) start.records.fault(row).raise();
    TORCH_CHECK_INDEX(table >= 0 && table < start.most_tables, "tables: expected below ", start.most_tables, ", found ",
                      table);
    if (row < 0) continue;
    char* const record = start.records[row];
    std::memset(record, 0, start.layout.bytes);
    for (size_t g = 0; g < start.layout.groups.size(); ++g)
      write_group(start, i, static_cast<int64_t>(g), record, scratch.data());
    Meta& meta = *start.records.meta(row);
    start.seen.note(meta, i);
    meta.id = start.ids[i];
    meta.table_and_mark = table | start.mark << 32;
  }
}

void records_add(at::TensorList chunks, const at::Tensor& rows_, const at::Tensor& ids_, const at::Tensor& tables_,
                 const at::Tensor& now_, const std::optional<at::Tensor>& counts_, const at::Tensor& keys_,
                 const at::Tensor& stds_, at::IntArrayRef numbers, at::ArrayRef<double> first, int64_t mark) {
  const RecordLayout layout(numbers);
  const Records records(chunks, layout);
  const at::Tensor rows = rows_.contiguous(), ids = ids_.contiguous(), tables = tables_.contiguous();
  const at::Tensor now = now_.contiguous(), keys = keys_.contiguous(), stds = stds_.contiguous();
  const at::Tensor counts = counts_.has_value() ? counts_->contiguous() : at::Tensor();
  const int64_t n = rows.numel(), groups = static_cast<int64_t>(layout.groups.size());
  TORCH_CHECK_VALUE(ids.numel() == n && tables.numel() == n && (now.numel() == 1 || now.numel() == n) &&
                        (!counts.defined() || counts.numel() == n),
                    "ids: expected ", n, " with their tables, times and counts");
  TORCH_CHECK_VALUE(stds.numel() % groups == 0 && keys.numel() == 2 * stds.numel(), "keys: expected [tables, groups, 2]");
  TORCH_CHECK_VALUE(static_cast<int64_t>(first.size()) == 1 + groups, "first: expected the accumulator and scales");
  const Start start{records,
                    layout,
                    rows.const_data_ptr<int64_t>(),
                    ids.const_data_ptr<int64_t>(),
                    tables.const_data_ptr<int64_t>(),
                    {now.const_data_ptr<int64_t>(), now.numel() > 1,
                     counts.defined() ? counts.const_data_ptr<int64_t>() : nullptr},
                    keys.const_data_ptr<int64_t>(),
                    stds.const_data_ptr<float>(),
                    first.data() + 1,
                    stds.numel() / groups,
                    static_cast<float>(first[0]),
                    mark};
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / layout.width),
                   [&](int64_t begin, int64_t end) { write_records(start, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("records_find", &records_find);
  m.impl("records_add", &records_add);
}
