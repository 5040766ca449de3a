// Messages of ids from rank to rank as kernels/message_layout.py describes them: one pass to write all of a rank's, one
// to read those that came.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace {

constexpr int64_t kWord = 8, kPart = 0, kTotal = 1, kLargest = 2, kFixed = 3;

// What kernels/message_layout.py says of the same numbers. Column 0 is that of ids; that of kinds' numbers is the last.
struct Layout {
  int64_t room, kinds, told, header, words, units;
  bool numbered;
  std::vector<int64_t> sizes, begins, unit;  // bytes, first word in a message, first int32 in a row of the second one

  explicit Layout(at::IntArrayRef numbers) {
    TORCH_CHECK_VALUE(numbers.size() >= 3 && numbers[0] >= 0 && numbers[0] % 4 == 0 && numbers[1] >= 1 && numbers[2] >= 0,
                      "layout: expected room, kinds, told and sizes, found ", numbers);
    room = numbers[0], kinds = numbers[1], told = numbers[2];
    const int64_t number_bytes = kinds <= std::numeric_limits<int16_t>::max() ? 2 : 4;
    numbered = room > 0 && number_bytes * room < 4 * kinds;
    header = kFixed + told + (numbered ? 0 : (kinds + 1) / 2);
    sizes.push_back(kWord);
    for (size_t i = 3; i < numbers.size(); ++i) sizes.push_back(numbers[i]);
    if (numbered) sizes.push_back(number_bytes);
    words = header;
    units = 0;
    for (const int64_t size : sizes) {
      TORCH_CHECK_VALUE(size == 2 || size == 4 || size == 8, "layout: expected sizes of 2, 4 or 8, found ", size);
      begins.push_back(words);
      unit.push_back(units);
      words += room * size / kWord;
      units += std::max<int64_t>(1, size / 4);
    }
  }

  size_t given() const { return sizes.size() - 1 - (numbered ? 1 : 0); }  // columns beside the ids
};

// A copy of 2, 4 or 8 bytes.
inline void copy(char* to, const char* from, int64_t size) {
  if (size == 8)
    std::memcpy(to, from, 8);
  else if (size == 4)
    std::memcpy(to, from, 4);
  else
    std::memcpy(to, from, 2);
}

struct Owners {
  uint64_t ranks, world, each;
  bool power;

  explicit Owners(at::IntArrayRef numbers) {
    TORCH_CHECK_VALUE(numbers.size() == 3 && numbers[0] > 0 && numbers[1] > 0 && numbers[2] > 0,
                      "owners: expected ranks, world and each, found ", numbers);
    ranks = numbers[0], world = numbers[1], each = numbers[2];
    power = (world & (world - 1)) == 0;
  }

  uint32_t of(int64_t id) const {
    const uint64_t bits = static_cast<uint64_t>(id), owner = power ? bits & (world - 1) : bits % world;
    return static_cast<uint32_t>(ranks == world ? owner : owner / each % ranks);
  }
};

std::vector<at::Tensor> contiguous(at::TensorList tensors) {
  std::vector<at::Tensor> found;
  for (const at::Tensor& tensor : tensors) found.push_back(tensor.contiguous());
  return found;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> pack_ids(const at::Tensor& ids_, const at::Tensor& bounds_,
                                                                    at::TensorList columns_, const at::Tensor& told_,
                                                                    at::IntArrayRef owners, at::IntArrayRef numbers) {
  const Layout layout(numbers);
  const Owners owner_of(owners);
  const at::Tensor ids = ids_.contiguous(), bounds = bounds_.contiguous(), told = told_.contiguous();
  const std::vector<at::Tensor> columns = contiguous(columns_);
  const int64_t n = ids.numel(), ranks = static_cast<int64_t>(owner_of.ranks), words = layout.words;
  TORCH_CHECK_VALUE(bounds.numel() == layout.kinds + 1, "bounds: expected ", layout.kinds + 1, " for the layout");
  TORCH_CHECK_VALUE(columns.size() == layout.given(), "columns: expected ", layout.given(), ", found ", columns.size());
  TORCH_CHECK_VALUE(told.numel() == layout.told, "told: expected ", layout.told, " numbers, found ", told.numel());
  for (size_t c = 0; c < columns.size(); ++c)
    TORCH_CHECK_VALUE(columns[c].numel() == n && columns[c].element_size() == layout.sizes[c + 1],
                      "columns: expected ", n, " elements of ", layout.sizes[c + 1], " bytes");
  const int64_t* const in = ids.const_data_ptr<int64_t>();
  const int64_t* const bound = bounds.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(bound[0] == 0 && bound[layout.kinds] == n, "bounds: expected from 0 to ", n);
  for (int64_t k = 0; k < layout.kinds; ++k) TORCH_CHECK_VALUE(bound[k] <= bound[k + 1], "bounds: expected ascending");

  at::Tensor message = at::empty({ranks, words}, ids.options());
  at::Tensor order = at::empty({n}, ids.options()), places = at::empty({n}, ids.options());
  at::Tensor parts = at::empty({ranks}, ids.options());
  int64_t* const out = message.mutable_data_ptr<int64_t>();
  int64_t* const part = parts.mutable_data_ptr<int64_t>();
  std::fill(part, part + ranks, 0);
  std::vector<uint32_t> owner(n);
  for (int64_t i = 0; i < n; ++i) ++part[owner[i] = owner_of.of(in[i])];
  const int64_t largest = ranks > 0 ? *std::max_element(part, part + ranks) : 0;
  std::vector<int64_t> begins(ranks), next(ranks);
  for (int64_t r = 0, total = 0; r < ranks; ++r) {
    begins[r] = next[r] = total;
    total += part[r];
    int64_t* const header = out + r * words;
    header[kPart] = part[r], header[kTotal] = n, header[kLargest] = largest;
    if (layout.told) std::memcpy(header + kFixed, told.const_data_ptr<double>(), layout.told * kWord);
  }
  int64_t* const to = order.mutable_data_ptr<int64_t>();
  int64_t* const place_of = places.mutable_data_ptr<int64_t>();
  std::vector<const char*> from;
  for (const at::Tensor& column : columns) from.push_back(static_cast<const char*>(column.const_data_ptr()));
  for (int64_t k = 0; k < layout.kinds; ++k) {
    for (int64_t i = bound[k]; i < bound[k + 1]; ++i) {
      const int64_t r = owner[i], at = next[r]++, place = at - begins[r];
      to[at] = i;
      place_of[i] = at;
      if (place >= layout.room) continue;
      int64_t* const mine = out + r * words;
      mine[layout.begins[0] + place] = in[i];
      for (size_t c = 0; c < from.size(); ++c) {
        const int64_t size = layout.sizes[c + 1];
        copy(reinterpret_cast<char*>(mine + layout.begins[c + 1]) + place * size, from[c] + i * size, size);
      }
      if (layout.numbered) {
        const size_t last = layout.sizes.size() - 1;
        const int64_t size = layout.sizes[last];
        copy(reinterpret_cast<char*>(mine + layout.begins[last]) + place * size, reinterpret_cast<const char*>(&k), size);
      }
    }
    if (layout.numbered) continue;
    for (int64_t r = 0; r < ranks; ++r)
      reinterpret_cast<int32_t*>(out + r * words + kFixed + layout.told)[k] = static_cast<int32_t>(next[r] - begins[r]);
  }
  if (!layout.numbered && layout.kinds % 2)  // half a word is left
    for (int64_t r = 0; r < ranks; ++r)
      reinterpret_cast<int32_t*>(out + r * words + kFixed + layout.told)[layout.kinds] = 0;
  return {message, order, places, parts};
}

// Where a column of the ids that came lies: in the messages, and for those without room in the second one.
struct Came {
  const Layout& layout;
  const int64_t* message;
  const int32_t* late;                // rows of layout.units
  std::vector<int64_t> late_begins;   // first row of each rank

  const char* at(size_t column, int64_t rank, int64_t place) const {
    const int64_t size = layout.sizes[column];
    if (place < layout.room)
      return reinterpret_cast<const char*>(message + rank * layout.words + layout.begins[column]) + place * size;
    const int64_t row = late_begins[rank] + place - layout.room;
    return reinterpret_cast<const char*>(late + row * layout.units + layout.unit[column]);  // little-endian
  }

  int64_t number(int64_t rank, int64_t place) const {
    int64_t found = 0;
    copy(reinterpret_cast<char*>(&found), at(layout.sizes.size() - 1, rank, place), layout.sizes.back());
    return found;
  }
};

std::vector<at::Tensor> read_ids(const at::Tensor& message_, const at::Tensor& late_, int64_t count,
                                 at::IntArrayRef numbers) {
  const Layout layout(numbers);
  const at::Tensor message = message_.contiguous(), late = late_.contiguous();
  TORCH_CHECK_VALUE(message.dim() == 2 && message.size(1) == layout.words, "message: expected int64 [ranks, ",
                    layout.words, "], found ", message.sizes());
  const int64_t ranks = message.size(0), kinds = layout.kinds;
  const int64_t* const in = message.const_data_ptr<int64_t>();
  Came came{layout, in, late.const_data_ptr<int32_t>(), {}};
  std::vector<int64_t> begins(ranks);
  int64_t total = 0, rows = 0;
  for (int64_t r = 0; r < ranks; ++r) {
    const int64_t part = in[r * layout.words + kPart];
    TORCH_CHECK_VALUE(part >= 0, "message: expected 0 or more ids, found ", part);
    begins[r] = total;
    came.late_begins.push_back(rows);
    total += part;
    rows += std::max<int64_t>(0, part - layout.room);
  }
  TORCH_CHECK_VALUE(total == count, "count: expected ", total, " ids, found ", count);
  TORCH_CHECK_VALUE(rows * layout.units == late.numel(), "late: expected int32 [", rows, ", ", layout.units, "], found ",
                    late.sizes());
  const auto empty = [&](int64_t size, at::ScalarType type) { return at::empty({size}, message.options().dtype(type)); };
  at::Tensor bounds = empty(kinds + 1, at::kLong), order = empty(count, at::kLong), from = empty(count, at::kLong);
  std::vector<at::Tensor> found{empty(count, at::kLong), bounds, order, from};
  std::vector<char*> out{static_cast<char*>(found[0].mutable_data_ptr())};
  for (size_t c = 1; c <= layout.given(); ++c) {
    const int64_t size = layout.sizes[c];
    found.push_back(empty(count, size == 8 ? at::kLong : size == 4 ? at::kInt : at::kShort));
    out.push_back(static_cast<char*>(found.back().mutable_data_ptr()));
  }
  int64_t* const bound = bounds.mutable_data_ptr<int64_t>();
  int64_t* const arrival = order.mutable_data_ptr<int64_t>();
  int64_t* const rank_of = from.mutable_data_ptr<int64_t>();
  std::vector<int64_t> next(kinds + 1, 0);
  const auto part_of = [&](int64_t r) { return in[r * layout.words + kPart]; };
  const auto ends_of = [&](int64_t r) {
    return reinterpret_cast<const int32_t*>(in + r * layout.words + kFixed + layout.told);
  };
  for (int64_t r = 0; r < ranks; ++r) {
    if (layout.numbered) {
      for (int64_t place = 0; place < part_of(r); ++place) {
        const int64_t k = came.number(r, place);
        TORCH_CHECK_INDEX(k >= 0 && k < kinds, "message: expected kinds below ", kinds, ", found ", k);
        ++next[k + 1];
      }
      continue;
    }
    int64_t before = 0;
    for (int64_t k = 0; k < kinds; ++k) {
      const int64_t end = ends_of(r)[k];
      TORCH_CHECK_VALUE(end >= before && end <= part_of(r), "message: expected ends of kinds to ascend");
      next[k + 1] += end - before;
      before = end;
    }
    TORCH_CHECK_VALUE(before == part_of(r), "message: expected kinds of ", part_of(r), " ids, found ", before);
  }
  for (int64_t k = 0; k < kinds; ++k) next[k + 1] += next[k];
  std::copy(next.begin(), next.end(), bound);
  const auto take = [&](int64_t k, int64_t r, int64_t place) {
    const int64_t at = next[k]++;
    arrival[at] = begins[r] + place;
    rank_of[at] = r;
    for (size_t c = 0; c < out.size(); ++c) {
      const int64_t size = layout.sizes[c];
      copy(out[c] + at * size, came.at(c, r, place), size);
    }
  };
  for (int64_t r = 0; r < ranks; ++r) {
    if (layout.numbered) {
      for (int64_t place = 0; place < part_of(r); ++place) take(came.number(r, place), r, place);
      continue;
    }
    int64_t place = 0;
    for (int64_t k = 0; k < kinds; ++k)
      for (const int64_t end = ends_of(r)[k]; place < end; ++place) take(k, r, place);
  }
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(tessera, CPU, m) {
  m.impl("pack_ids", &pack_ids);
  m.impl("read_ids", &read_ids);
}
