#include "sim/layer.hpp"

namespace kvreplay {

SetShape Layer::shape() const {
  SetShape s;
  s.layer = index;
  s.n_model_layers = n_model_layers;
  s.head_dim = head_dim;
  s.v_head_dim = v_head_dim;
  s.n_tokens = n_tokens;
  s.prompt_len = prompt_len;
  s.element_bytes = element_bytes;
  s.scale = scale;
  s.rotation = rotation ? &*rotation : nullptr;
  s.spans = spans;
  return s;
}

}  // namespace kvreplay
