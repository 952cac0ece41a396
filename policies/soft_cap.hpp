// A model's cap on its logits.
#pragma once
#include <type_traits>

namespace kvreplay {

// logits -> logits of a layer with a soft-cap; does nothing where cap is 0.
template <class Array>
void soft_cap(float cap, Array&& logits) {
  if (cap > 0) {
    using Scalar = typename std::decay_t<Array>::Scalar;
    const auto c = static_cast<Scalar>(cap);
    logits = c * (logits / c).tanh();
  }
}

}  // namespace kvreplay
