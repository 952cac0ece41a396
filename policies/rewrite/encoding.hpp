// What the encoders share: which slots are due, whether keys, values or both are encoded, and how a slot is stored.
#pragma once
#include <algorithm>
#include <array>

#include "policies/params.hpp"

namespace kvreplay {

enum class What { both, keys, values };
inline constexpr std::string_view kWhats[] = {"both", "keys", "values"};
inline constexpr std::string_view kWhatDoc = "which half of the cache is encoded; the other stays exact";
inline bool has_keys(What what) { return what != What::values; }
inline bool has_values(What what) { return what != What::keys; }

// How far a cache is encoded: every slot before a position, so that eviction moves nothing.
class Frontier {
 public:
  int slot(const View& view) const {  // the first that is not
    return static_cast<int>(std::lower_bound(view.pos.begin(), view.pos.end(), until_) - view.pos.begin());
  }
  void advance(const View& view, int n_slots) {
    if (n_slots > 0) {
      until_ = std::max(until_, view.pos[static_cast<std::size_t>(n_slots - 1)] + 1);
    }
  }

 private:
  Pos until_ = 0;
};

// Whole batches that are due where so many slots have gathered from `begin` on; returns their end.
inline int end_of_batches(int begin, int n_slots, int batch) { return begin + (n_slots - begin) / batch * batch; }

inline MatF keys_of(const View& view, int lane, int begin, int end) {  // (slots, head_dim)
  MatF k(end - begin, view.head_dim);
  for (int i = begin; i < end; ++i) {
    k.row(i - begin) = view.key(lane, i);
  }
  return k;
}
inline MatF values_of(const View& view, int lane, int begin, int end) {  // (slots, v_head_dim)
  MatF v(end - begin, view.v_head_dim);
  for (int i = begin; i < end; ++i) {
    v.row(i - begin) = view.value(lane, i);
  }
  return v;
}
// Both halves of the slots from `begin` on, one row each.
inline void store_slots(Cache& cache, int lane, int begin, const MatF& k, const MatF& v, double bytes) {
  for (int i = 0; i < static_cast<int>(k.rows()); ++i) {
    cache.rewrite(lane, begin + i, k.row(i), v.row(i), cache.bias(lane, begin + i), bytes);
  }
}

// Bytes of a slot of which one half or both are encoded in so many.
inline double slot_bytes(What what, double key, double value, const SetShape& shape) {
  return (has_keys(what) ? key : static_cast<double>(shape.head_dim) * shape.element_bytes) +
         (has_values(what) ? value : static_cast<double>(shape.v_head_dim) * shape.element_bytes);
}

}  // namespace kvreplay
