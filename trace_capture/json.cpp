#include "trace_capture/json.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <set>
#include <system_error>
#include <vector>

#include "policies/errors.hpp"

namespace kvreplay {
namespace {

constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxShown = 80;

std::string shorten(std::string text) {
  if (text.size() > kMaxShown) {
    text.resize(kMaxShown - 3);
    text += "...";
  }
  return text;
}

}  // namespace

std::string read_text(const std::filesystem::path& path, std::uint64_t max_bytes) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    throw ConfigError(fmt::format("{}: expected a file, found a folder", path.string()));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw ConfigError(fmt::format("{}: cannot be opened: {}", path.string(), std::generic_category().message(errno)));
  }
  // To its end, and not as many bytes as it says it has: a pipe has no size.
  std::string text;
  std::vector<char> block(std::size_t{1} << 16);
  while (file.read(block.data(), std::ssize(block)) || file.gcount() > 0) {
    text.append(block.data(), static_cast<std::size_t>(file.gcount()));
    if (text.size() > max_bytes) {
      throw ConfigError(fmt::format("{}: expected at most {} bytes, found more", path.string(), max_bytes));
    }
  }
  if (file.bad()) {
    throw ConfigError(fmt::format("{}: cannot be read", path.string()));
  }
  return text;
}

nlohmann::json::parser_callback_t depth_and_names(const std::string& where, Names names) {
  using Event = nlohmann::json::parse_event_t;
  // seen: names of the objects that are open, outermost first
  return [where, names, seen = std::vector<std::set<std::string>>()](int depth, Event event,
                                                                     nlohmann::json& parsed) mutable {
    if (depth > kMaxDepth) {
      throw ConfigError(fmt::format("{}: JSON is nested deeper than {} levels", where, kMaxDepth));
    }
    if (names == Names::unique) {
      if (event == Event::object_start) {
        seen.emplace_back();
      } else if (event == Event::object_end) {
        seen.pop_back();
      } else if (event == Event::key && !seen.back().insert(parsed.get<std::string>()).second) {
        throw ConfigError(fmt::format("{}: the name {} is there twice", where, shown(parsed)));
      }
    }
    return true;
  };
}

nlohmann::json parse_object(std::string_view text, const std::string& where, Names names) {
  nlohmann::json value;
  try {
    value = nlohmann::json::parse(text, depth_and_names(where, names));
  } catch (const nlohmann::json::parse_error& error) {
    throw ConfigError(fmt::format("{}: expected JSON, found none from byte {} on", where, error.byte));
  } catch (const nlohmann::json::exception&) {
    throw ConfigError(fmt::format("{}: expected JSON, found a number that is too large", where));
  }
  if (!value.is_object()) {
    throw ConfigError(fmt::format("{}: expected a JSON object, found {}", where, shown(value)));
  }
  return value;
}

std::string shown(const nlohmann::json& value) {
  return shorten(value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace));
}

std::string shown(std::string_view name) {
  std::string text(name.substr(0, kMaxShown + 1));
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < 0x20 || c > 0x7e; }, '?');
  return shorten(std::move(text));
}

}  // namespace kvreplay
