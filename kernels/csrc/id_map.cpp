// The id map on the state that kernels/id_map.py describes: a directory, segments in chunks, counters.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "mix.h"
#include "multiversion.h"

namespace {

// As in kernels/reference/id_map.py.
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ULL;
constexpr int64_t kSlots = 4096;
constexpr int64_t kLine = 4;
constexpr uint32_t kSegmentsPerChunk = 256;
constexpr double kLimit = 0.8;
constexpr double kSpread = 0.5;

constexpr int64_t kGrain = 1 << 13;  // ids per thread below which another thread does not pay
constexpr int64_t kAhead = 16;       // ids between the request for a slot and its use
constexpr int64_t kBlock = 64;       // ids hashed together

struct Slot {
  uint64_t hash;
  int64_t row;  // -1: empty
};

struct Segment {
  int32_t depth;  // number of upper bits that all hashes in it share
  int32_t ids;
  int32_t limit;
};

TESSERA_SIMD void hash_ids(const int64_t* ids, int64_t n, uint64_t* hashes) {
  for (int64_t i = 0; i < n; ++i) hashes[i] = tessera::mix64(static_cast<uint64_t>(ids[i]) + kGolden);
}

// A hash is looked for from the beginning of a cache line on, so that most searches see one line.
TESSERA_INLINE int64_t home_of(uint64_t hash) { return static_cast<int64_t>(hash & (kSlots - kLine)); }

// Where an id is looked for, and the segment in which the search goes round.
struct Place {
  Slot* segment;
  uint64_t hash;

  void prefetch() const { __builtin_prefetch(segment + home_of(hash), 1); }

  // The row of the hash or -1. Lines fill from their beginning, so one with an empty last slot ends the search. The
  // slots of a line are compared without a branch that could be guessed wrong: all other slots, and emptied ones that
  // still show the hash, contribute -1 to the conjunction, which is all ones.
  int64_t row() const {
    for (int64_t at = home_of(hash);; at = (at + kLine) & (kSlots - 1)) {
      const Slot* const line = segment + at;
      int64_t found = -1;
      for (int64_t i = 0; i < kLine; ++i) found &= line[i].row | -static_cast<int64_t>(line[i].hash != hash);
      if (found >= 0 || line[kLine - 1].row < 0) return found;
    }
  }

  // The slot of the hash, or the empty slot that ends its search: as many of a line are used as come before it.
  Slot* slot() const {
    for (int64_t at = home_of(hash);; at = (at + kLine) & (kSlots - 1)) {
      Slot* const line = segment + at;
      int64_t used = 0, found = -1;
      for (int64_t i = 0; i < kLine; ++i) {
        used += line[i].row >= 0;
        found &= i | -static_cast<int64_t>((line[i].hash != hash) | (line[i].row < 0));
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
  Place place(uint64_t hash) const { return {slots_of(segment_of(hash)), hash}; }

 private:
  const int32_t* directory_;
  int64_t size_;
  int64_t bits_ = 0;
  std::vector<Slot*> chunks_;
};

void find_range(const Map& map, const int64_t* ids, int64_t n, int64_t* rows) {
  uint64_t hashes[kBlock];
  Place places[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t block = std::min(kBlock, n - begin);
    hash_ids(ids + begin, block, hashes);
    for (int64_t i = 0; i < block; ++i) {
      places[i] = map.place(hashes[i]);
      places[i].prefetch();
    }
    for (int64_t i = 0; i < block; ++i) {
      rows[begin + i] = places[i].row();
    }
  }
}

at::Tensor id_map_find(const at::Tensor& directory, at::TensorList chunks, const at::Tensor& ids_) {
  const Map map(directory, chunks);
  const at::Tensor ids = ids_.contiguous();
  at::Tensor rows = at::empty({ids.numel()}, ids.options());
  const int64_t* in = ids.const_data_ptr<int64_t>();
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  at::parallel_for(0, ids.numel(), kGrain, [&](int64_t begin, int64_t end) {
    find_range(map, in + begin, end - begin, out + begin);
  });
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
  int64_t run(const int64_t* ids, const int64_t* rows, int64_t n) {
    uint64_t hashes[kBlock];
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t block = std::min(kBlock, n - begin);
      hash_ids(ids + begin, block, hashes);
      for (int64_t i = 0; i < std::min(kAhead, block); ++i) map_.place(hashes[i]).prefetch();
      for (int64_t i = 0; i < block; ++i) {
        if (i + kAhead < block) map_.place(hashes[i + kAhead]).prefetch();
        TORCH_CHECK_VALUE(rows[begin + i] >= 0, "rows: expected 0 or more, found ", rows[begin + i]);
        if (!make_room(hashes[i])) return begin + i;
        add(ids[begin + i], hashes[i], rows[begin + i]);
      }
    }
    return n;
  }

 private:
  void add(int64_t id, uint64_t hash, int64_t row) {
    const int32_t segment = map_.segment_of(hash);
    Slot* const slot = Place{map_.slots_of(segment), hash}.slot();
    TORCH_CHECK_VALUE(slot->row < 0, "ids: expected distinct, unknown ids, found ", id, " which is already known");
    *slot = {hash, row};
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
    for (int64_t i = 0; i < waiting; ++i) *Place{halves[(late[i].hash >> shift) & 1], late[i].hash}.slot() = late[i];
    return static_cast<int32_t>(upper);
  }

  Map map_;
  int32_t* directory_;
  Segment* segments_;
  int64_t capacity_;
  int64_t* counters_;
};

void id_map_insert(const at::Tensor& directory, at::TensorList chunks, const at::Tensor& segments,
                   const at::Tensor& counters, const at::Tensor& ids_, const at::Tensor& rows_) {
  const at::Tensor ids = ids_.contiguous(), rows = rows_.contiguous();
  TORCH_CHECK_VALUE(ids.numel() == rows.numel(), "rows: expected ", ids.numel(), ", found ", rows.numel());
  Insertion insertion(directory, chunks, segments, counters);
  counters.data_ptr<int64_t>()[2] =
      insertion.run(ids.const_data_ptr<int64_t>(), rows.const_data_ptr<int64_t>(), ids.numel());
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
                        const at::Tensor& counters, const at::Tensor& ids_) {
  const Map map(directory, chunks);
  const at::Tensor ids = ids_.contiguous();
  const int64_t n = ids.numel();
  at::Tensor rows = at::empty({n}, ids.options());
  const int64_t* in = ids.const_data_ptr<int64_t>();
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  auto* const states = reinterpret_cast<Segment*>(segments.data_ptr<int32_t>());
  uint64_t hashes[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t block = std::min(kBlock, n - begin);
    hash_ids(in + begin, block, hashes);
    for (int64_t i = 0; i < block; ++i) {
      map.place(hashes[i]).prefetch();
    }
    for (int64_t i = 0; i < block; ++i) {
      const int32_t segment = map.segment_of(hashes[i]);
      const Place place{map.slots_of(segment), hashes[i]};
      const Slot* const slot = place.slot();
      out[begin + i] = slot->row;
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
