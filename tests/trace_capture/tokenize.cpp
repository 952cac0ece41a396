// Text to ids on the command line, for comparing with other tokenizers.
//   tokenize FOLDER [--plain] < texts.json     a JSON list of texts -> {"ids": [[...], ...], "texts": [decoded, ...]}
// --plain leaves out what the post-processor adds.
#include <iostream>
#include <nlohmann/json.hpp>
#include <string_view>

#include "policies/errors.hpp"
#include "trace_capture/tokenizer.hpp"

int main(int argc, char** argv) {
  const bool plain = argc == 3 && std::string_view(argv[2]) == "--plain";
  if (argc < 2 || argc > 3 || (argc == 3 && !plain)) {
    std::cerr << "usage: tokenize FOLDER [--plain] < texts.json\n";
    return 2;
  }
  try {
    const kvreplay::Tokenizer tokenizer(argv[1]);
    const nlohmann::json texts = nlohmann::json::parse(std::cin);
    nlohmann::json out = {{"ids", nlohmann::json::array()}, {"texts", nlohmann::json::array()}};
    for (const auto& text : texts) {
      const auto ids = tokenizer.encode(text.get_ref<const std::string&>(), !plain);
      out["texts"].push_back(tokenizer.decode(ids));
      out["ids"].push_back(ids);
    }
    std::cout << out << '\n';
  } catch (const kvreplay::ConfigError& error) {
    std::cerr << error.what() << '\n';
    return 2;
  }
  return 0;
}
