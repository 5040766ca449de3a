// Finding, inserting and erasing ids in the map of id_map.h.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "id_map.h"

namespace {

using namespace tessera::id_map;

// As in kernels/reference/id_map.py.
constexpr double kLimit = 0.8;
constexpr double kSpread = 0.5;

constexpr int64_t kGrain = 1 << 13;  // ids per thread below which another thread does not pay
constexpr int64_t kAhead = 16;       // ids between the request for a slot and its use

struct Segment {
  int32_t depth;  // number of upper bits that all hashes in it share
  int32_t ids;
  int32_t limit;
};

// Ids and tables of a call, which live as long as this.
struct Given {
  at::Tensor ids, tables;

  Given(const at::Tensor& ids_, const std::optional<at::Tensor>& tables_)
      : ids(ids_.contiguous()), tables(tables_.has_value() ? tables_->contiguous() : at::Tensor()) {
    if (!tables.defined()) return;
    TORCH_CHECK_VALUE(tables.numel() == ids.numel(), "tables: expected ", ids.numel(), ", found ", tables.numel());
    const int64_t* const numbers = tables.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < tables.numel(); ++i) check_table(numbers[i]);
  }

  Keys keys() const {
    return {ids.const_data_ptr<int64_t>(), tables.defined() ? tables.const_data_ptr<int64_t>() : nullptr, 0};
  }
};

void find_range(const Map& map, const Keys& keys, int64_t first, int64_t last, int64_t* rows) {
  uint64_t hashes[kBlock];
  Place places[kBlock];
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t block = std::min(kBlock, last - begin);
    hash_keys(keys, begin, block, hashes);
    for (int64_t i = 0; i < block; ++i) {
      places[i] = map.place(hashes[i], keys.table_of(begin + i));
      places[i].prefetch();
    }
    for (int64_t i = 0; i < block; ++i) {
      rows[begin + i] = places[i].row();
    }
  }
}

at::Tensor id_map_find(const at::Tensor& directory, at::TensorList chunks, const at::Tensor& ids,
                       const std::optional<at::Tensor>& tables) {
  const Map map(directory, chunks);
  const Given given(ids, tables);
  const Keys keys = given.keys();
  at::Tensor rows = at::empty({ids.numel()}, ids.options());
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  at::parallel_for(0, ids.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { find_range(map, keys, begin, end, out); });
  return rows;
}

int32_t split_limit(uint64_t prefix, int32_t depth) {
  const double share = std::ldexp(static_cast<double>(prefix), -depth);
  return static_cast<int32_t>(kSlots * kLimit * std::exp2(-kSpread * share));
}

// Insertion on one thread: new ids are few, and their order decides nothing but their slots.
class Insertion {
 public:
  Insertion(const at::Tensor& directory, at::TensorList chunks, const at::Tensor& segments, const at::Tensor& counters)
      : map_(directory, chunks),
        directory_(directory.data_ptr<int32_t>()),
        segments_(reinterpret_cast<Segment*>(segments.data_ptr<int32_t>())),
        capacity_(segments.size(0)),
        counters_(counters.data_ptr<int64_t>()) {
    TORCH_CHECK_VALUE(segments.is_contiguous() && segments.dim() == 2 && segments.size(1) == 3 &&
                          capacity_ == static_cast<int64_t>(chunks.size()) * kSegmentsPerChunk,
                      "segments: expected [", chunks.size() * kSegmentsPerChunk, ", 3], found ", segments.sizes());
  }

  // Returns how many ids went in before a chunk or a bit of the directory was missing.
  int64_t run(const Keys& keys, const int64_t* rows, int64_t n) {
    uint64_t hashes[kBlock];
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t block = std::min(kBlock, n - begin);
      hash_keys(keys, begin, block, hashes);
      for (int64_t i = 0; i < std::min(kAhead, block); ++i) map_.place(hashes[i], 0).prefetch();
      for (int64_t i = 0; i < block; ++i) {
        if (i + kAhead < block) map_.place(hashes[i + kAhead], 0).prefetch();
        const int64_t row = rows[begin + i];
        TORCH_CHECK_VALUE(row >= 0 && row <= kRowMask, "rows: expected 0 to 2^40 - 1, found ", row);
        if (!make_room(hashes[i])) return begin + i;
        add(keys.ids[begin + i], keys.table_of(begin + i), hashes[i], row);
      }
    }
    return n;
  }

 private:
  void add(int64_t id, int64_t table, uint64_t hash, int64_t row) {
    const int32_t segment = map_.segment_of(hash);
    Slot* const slot = Place{map_.slots_of(segment), hash, table}.slot();
    TORCH_CHECK_VALUE(slot->row < 0, "ids: expected distinct, unknown ids, found ", id, " which is already known");
    *slot = {hash, row | table << kTableShift};
    ++segments_[segment].ids;
    ++counters_[1];
  }

  bool make_room(uint64_t hash) {
    for (;;) {
      const int32_t segment = map_.segment_of(hash);
      const Segment& state = segments_[segment];
      if (state.ids < state.limit) return true;
      if (state.depth == map_.bits() || counters_[0] == capacity_) return false;
      split(segment, hash);
    }
  }

  // Deal one segment out to itself (next upper bit 0) and a new one (1); `hash` is any of its hashes.
  void split(int32_t segment, uint64_t hash) {
    const auto sibling = static_cast<int32_t>(counters_[0]++);
    const int32_t depth = segments_[segment].depth + 1;
    const uint64_t prefix = ((hash >> 1) >> (64 - depth)) << 1;  // depth bits, the last one 0
    const int64_t entries = int64_t{1} << (map_.bits() - depth);
    std::fill_n(directory_ + (prefix + 1) * entries, entries, sibling);

    Slot held[kSlots];
    Slot* const halves[2] = {map_.slots_of(segment), map_.slots_of(sibling)};
    std::memcpy(held, halves[0], sizeof(held));
    std::fill_n(halves[0], kSlots, Slot{0, -1});
    std::fill_n(halves[1], kSlots, Slot{0, -1});
    const int32_t moved = deal(held, halves, 64 - depth);
    segments_[sibling] = {depth, moved, split_limit(prefix + 1, depth)};
    segments_[segment] = {depth, segments_[segment].ids - moved, split_limit(prefix, depth)};
  }

  // Put every pair of a full segment into the first free slot of its line in the half that bit `shift` names. The few
  // that find their line full wait until all others have their place. Returns how many went to the upper half.
  static int32_t deal(const Slot* held, Slot* const* halves, int shift) {
    uint8_t used[2][kSlots / kLine] = {};
    Slot late[kSlots];
    int64_t waiting = 0, upper = 0;
    for (int64_t i = 0; i < kSlots; ++i) {
      const Slot slot = held[i];
      const int64_t half = (slot.hash >> shift) & 1, home = home_of(slot.hash);
      uint8_t& count = used[half][home / kLine];
      const bool taken = slot.row >= 0, fits = count < kLine;
      if (taken & fits) halves[half][home + count] = slot;
      late[waiting] = slot;
      waiting += taken & !fits;
      count += taken & fits;
      upper += taken & (half == 1);
    }
    for (int64_t i = 0; i < waiting; ++i) {
      const Slot& slot = late[i];
      *Place{halves[(slot.hash >> shift) & 1], slot.hash, slot.row >> kTableShift}.slot() = slot;
    }
    return static_cast<int32_t>(upper);
  }

  Map map_;
  int32_t* directory_;
  Segment* segments_;
  int64_t capacity_;
  int64_t* counters_;
};

void id_map_insert(const at::Tensor& directory, at::TensorList chunks, const at::Tensor& segments,
                   const at::Tensor& counters, const at::Tensor& ids, const at::Tensor& rows_,
                   const std::optional<at::Tensor>& tables) {
  const Given given(ids, tables);
  const at::Tensor rows = rows_.contiguous();
  TORCH_CHECK_VALUE(ids.numel() == rows.numel(), "rows: expected ", ids.numel(), ", found ", rows.numel());
  Insertion insertion(directory, chunks, segments, counters);
  counters.data_ptr<int64_t>()[2] =
      insertion.run(given.keys(), rows.const_data_ptr<int64_t>(), ids.numel());
}

// Close the hole at `hole` by moving back every later pair of its run that may stand there.
void close_hole(Slot* segment, int64_t hole) {
  for (int64_t at = (hole + 1) & (kSlots - 1); segment[at].row >= 0; at = (at + 1) & (kSlots - 1)) {
    const int64_t home = home_of(segment[at].hash);
    if (((at - home) & (kSlots - 1)) >= ((at - hole) & (kSlots - 1))) {
      segment[hole] = segment[at];
      hole = at;
    }
  }
  segment[hole].row = -1;
}

at::Tensor id_map_erase(const at::Tensor& directory, at::TensorList chunks, const at::Tensor& segments,
                        const at::Tensor& counters, const at::Tensor& ids, const std::optional<at::Tensor>& tables) {
  const Map map(directory, chunks);
  const Given given(ids, tables);
  const Keys keys = given.keys();
  const int64_t n = ids.numel();
  at::Tensor rows = at::empty({n}, ids.options());
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  auto* const states = reinterpret_cast<Segment*>(segments.data_ptr<int32_t>());
  uint64_t hashes[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t block = std::min(kBlock, n - begin);
    hash_keys(keys, begin, block, hashes);
    for (int64_t i = 0; i < block; ++i) map.place(hashes[i], 0).prefetch();
    for (int64_t i = 0; i < block; ++i) {
      const int32_t segment = map.segment_of(hashes[i]);
      const Place place{map.slots_of(segment), hashes[i], keys.table_of(begin + i)};
      const Slot* const slot = place.slot();
      out[begin + i] = slot->row < 0 ? -1 : slot->row & kRowMask;
      if (slot->row < 0) continue;
      close_hole(place.segment, slot - place.segment);
      --states[segment].ids;
      --counters.data_ptr<int64_t>()[1];
    }
  }
  return rows;
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("id_map_find", &id_map_find);
  m.impl("id_map_insert", &id_map_insert);
  m.impl("id_map_erase", &id_map_erase);
}
