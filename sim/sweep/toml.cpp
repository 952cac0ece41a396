#include "sim/sweep/toml.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

bool beyond_ascii(char c) { return static_cast<unsigned char>(c) >= 0x80; }

// The line of the first character beyond ASCII where toml++ 3.3 looks for space and has undefined behaviour: outside of
// texts and comments, where TOML allows none, and after a backslash that ends a line of a text. 0 if there is none.
int line_of_stray(std::string_view text) {
  int line = 1;
  std::string_view closing;  // of what the scan is in: a text's quotes, or the end of a comment's line
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (closing.empty()) {
      if (beyond_ascii(c)) {
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
      const std::size_t next = text.find_first_not_of(" \t\r\n", i + 1);
      if (next != std::string_view::npos && next > i + 1 && beyond_ascii(text[next])) {
        return line;
      }
      ++i;
    } else if (text.substr(i, closing.size()) == closing || (closing.size() == 1 && c == '\n')) {
      i += closing.size() - 1;
      closing = {};
    }
    line += i < text.size() && text[i] == '\n';
  }
  return 0;
}

// The same structure in ASCII: two digits for each byte beyond it.
std::string in_ascii(std::string_view text) {
  std::string out;
  for (const char c : text) {
    out += beyond_ascii(c) ? fmt::format("{:02x}", static_cast<unsigned char>(c)) : std::string(1, c);
  }
  return out;
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
    // Where it is no TOML, what looks like a text above may be none for toml++.
    if (std::any_of(text.begin(), text.end(), beyond_ascii)) {
      static_cast<void>(toml::parse(in_ascii(text), name));
    }
    return toml::parse(text, name);
  } catch (const toml::parse_error& e) {
    throw ConfigError(fmt::format("{} line {}: {}", name, e.source().begin.line, std::string_view(e.description())));
  } catch (const BrokenToml& e) {
    throw ConfigError(fmt::format("{}: {}", name, e.what()));
  }
}

}  // namespace kvreplay
