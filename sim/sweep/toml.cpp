#include "sim/sweep/toml.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

// The line of the first character beyond ASCII that is neither in a text nor in a comment, where toml++ 3.3 has
// undefined behaviour and TOML allows none; 0 if there is none.
int line_of_stray(std::string_view text) {
  int line = 1;
  std::string_view closing;  // of what the scan is in: a text's quotes, or the end of a comment's line
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (closing.empty()) {
      if (static_cast<unsigned char>(c) >= 0x80) {
        return line;
      }
      if (c == '#') {
        closing = "\n";
      } else if (c == '"' || c == '\'') {
        const std::string_view three = text.substr(i, 3);
        closing = three == "\"\"\"" || three == "'''" ? three : three.substr(0, 1);
        i += closing.size() - 1;
      }
    } else if (c == '\\' && closing[0] == '"') {
      ++i;
    } else if (text.substr(i, closing.size()) == closing || (closing.size() == 1 && c == '\n')) {
      i += closing.size() - 1;
      closing = {};
    }
    line += i < text.size() && text[i] == '\n';
  }
  return 0;
}

}  // namespace

void throw_broken_toml() { throw BrokenToml(); }

toml::table parse_toml(std::string_view text, const std::string& name) {
  if (text.substr(0, 3) == "\xEF\xBB\xBF") {  // a byte-order mark
    text.remove_prefix(3);
  }
  if (const int line = line_of_stray(text); line > 0) {
    throw ConfigError(fmt::format("{} line {}: a character beyond ASCII outside of quotes and comments", name, line));
  }
  try {
    return toml::parse(text, name);
  } catch (const toml::parse_error& e) {
    throw ConfigError(fmt::format("{} line {}: {}", name, e.source().begin.line, std::string_view(e.description())));
  } catch (const BrokenToml& e) {
    throw ConfigError(fmt::format("{}: {}", name, e.what()));
  }
}

}  // namespace kvreplay
