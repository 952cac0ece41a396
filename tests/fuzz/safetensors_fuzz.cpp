// model.safetensors: any bytes, or a header of the input's with a right length and some data behind it.
#include <cstring>
#include <nlohmann/json.hpp>

#include "policies/errors.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "trace_capture/safetensors.hpp"

using namespace kvreplay;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const std::uint8_t mode = input.byte();
  const std::size_t n_data = 8 * std::size_t{mode};
  std::string header = input.all_text(), file;
  if (mode != 0) {
    file.resize(8);
    const std::uint64_t n_header = header.size();
    std::memcpy(file.data(), &n_header, 8);
    file += header + std::string(n_data, '\1');
  } else {
    file = header;
  }
  fuzz::write_file(fuzz::scratch() / "model.safetensors", file);
  fuzz::answered<ConfigError>([&] {
    const Safetensors weights(fuzz::scratch());
    weights.fingerprint();
    const nlohmann::json fields =
        nlohmann::json::parse(file.substr(8, file.size() - 8 - (mode != 0 ? n_data : 0)), nullptr, false);
    std::size_t total = 0;
    for (const std::string& name : weights.names()) {
      fuzz::answered<ConfigError>([&] {
        const auto found = fields.is_object() ? fields.find(name) : fields.end();
        const auto shape = fields.is_object() && found != fields.end()
                               ? found->at("shape").get<std::vector<std::int64_t>>()
                               : std::vector<std::int64_t>{};
        const Tensor tensor = weights.tensor(name, shape);
        const std::size_t bytes = static_cast<std::size_t>(tensor.size()) * size_of(tensor.type);
        total += bytes;
        unsigned sum = 0;
        for (std::size_t i = 0; i < bytes; ++i) {
          sum += std::to_integer<unsigned>(tensor.data[i]);
        }
        fuzz::require(mode == 0 || sum == bytes, "a tensor reads what is not data");
      });
    }
    fuzz::require(total <= file.size(), "tensors hold more than the file");
  });
  return 0;
}
