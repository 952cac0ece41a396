// config.json of a model folder, and the rotary frequencies that follow from it.
#include <cmath>

#include "policies/errors.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "trace_capture/config.hpp"
#include "trace_capture/rope.hpp"

using namespace kvreplay;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::write_file(fuzz::scratch() / "config.json", {reinterpret_cast<const char*>(data), size});
  fuzz::answered<ConfigError>([&] {
    const ModelConfig config = read_config(fuzz::scratch());
    fuzz::require(config.n_heads % config.n_kv_heads == 0, "heads do not divide");
    fuzz::require(config.sliding_window.size() == static_cast<std::size_t>(config.n_layers), "windows are missing");
    for (const int n_tokens : {1, 4096, 1 << 28}) {
      const RopeTable table = rope_table(config.rope, config.head_dim, config.max_positions, n_tokens);
      rope_is_fixed(config.rope, config.max_positions, n_tokens);
      fuzz::require(table.inv_freq.size() == static_cast<std::size_t>(config.head_dim / 2), "frequencies are missing");
      fuzz::require(std::isfinite(table.attention_factor), "the attention factor is not finite");
      for (const double frequency : table.inv_freq) {
        fuzz::require(std::isfinite(frequency), "a frequency is not finite");
      }
    }
  });
  return 0;
}
