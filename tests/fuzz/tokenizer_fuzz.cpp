// tokenizer.json, and behind a zero byte the text that it is to encode.
#include "policies/errors.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "trace_capture/tokenizer.hpp"

using namespace kvreplay;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = std::min(input.find('\0'), size);
  const std::string_view text = zero < size ? input.substr(zero + 1, 4096) : "Hello  w\u00f6rld 12345\n<s>";
  fuzz::write_file(fuzz::scratch() / "tokenizer.json", input.substr(0, zero));
  fuzz::answered<ConfigError>([&] {
    const Tokenizer tokenizer(fuzz::scratch());
    for (const bool add_special : {false, true}) {
      fuzz::answered<ConfigError>([&] {
        const std::vector<std::int32_t> ids = tokenizer.encode(text, add_special);
        for (const std::int32_t id : ids) {
          fuzz::require(id >= 0 && id < tokenizer.vocab_size(), "an id that the vocabulary lacks");
          tokenizer.piece(id);
        }
        tokenizer.decode(ids);
      });
    }
    fuzz::answered<ConfigError>([&] { tokenizer.piece(-1); });
    fuzz::answered<ConfigError>([&] { tokenizer.piece(tokenizer.vocab_size()); });
  });
  return 0;
}
