// A method's text cut into pieces and put together again, before anyone asks what they mean.
#pragma once
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvreplay {

// "h2o:window=8,sink=4": what stands between two "+".
struct Piece {
  std::string name;
  std::vector<std::pair<std::string, std::string>> settings;  // key and value, as written
};

// The name that starts at `begin`; empty if none does.
std::string_view name_at(std::string_view text, std::size_t begin);
// "/" separates only before the name of a selector or preset, so that paths may hold slashes.
std::vector<std::string> split_phases(const std::string& text);
// "+" separates only before a letter, so that 1e+3 is a number.
std::vector<std::string> split_parts(const std::string& text);
// ConfigError where a setting is not key=value.
Piece split_piece(const std::string& text);
std::string text_of(const Piece& piece);

}  // namespace kvreplay
