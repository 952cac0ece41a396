#include "policies/pieces.hpp"

#include <algorithm>
#include <cctype>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"

namespace kvreplay {
namespace {

bool letter(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0; }
bool in_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '-'; }
bool starts_method(std::string_view name) {
  const PartInfo* part = find_part(name);
  return find_preset(name) != nullptr || (part != nullptr && part->role == Role::select);
}

}  // namespace

std::string_view name_at(std::string_view text, std::size_t begin) {
  std::size_t end = begin;
  while (end < text.size() && in_name(text[end])) {
    ++end;
  }
  return text.substr(begin, end - begin);
}

std::vector<std::string> split_phases(const std::string& text) {
  std::vector<std::string> phases;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '/') {
      continue;
    }
    const std::string_view name = name_at(text, i + 1);
    const std::size_t after = i + 1 + name.size();
    const bool ends = after == text.size() || text[after] == ':' || text[after] == '+' || text[after] == '/';
    if (ends && starts_method(name)) {
      phases.push_back(text.substr(begin, i - begin));
      begin = i + 1;
    }
  }
  phases.push_back(text.substr(begin));
  return phases;
}

std::vector<std::string> split_parts(const std::string& text) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  for (std::size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] == '+' && letter(text[i + 1])) {
      parts.push_back(text.substr(begin, i - begin));
      begin = i + 1;
    }
  }
  parts.push_back(text.substr(begin));
  return parts;
}

Piece split_piece(const std::string& text) {
  Piece piece;
  const std::size_t colon = text.find(':');
  piece.name = text.substr(0, colon);
  if (colon == std::string::npos) {
    return piece;
  }
  for (std::size_t begin = colon + 1; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string setting = text.substr(begin, end - begin);
    const std::size_t equals = setting.find('=');
    if (equals == std::string::npos || equals == 0) {
      throw ConfigError("in '" + text + "' the piece '" + setting + "' is not key=value");
    }
    piece.settings.emplace_back(setting.substr(0, equals), setting.substr(equals + 1));
    begin = end + 1;
  }
  return piece;
}

std::string text_of(const Piece& piece) {
  std::string text = piece.name;
  for (const auto& [key, value] : piece.settings) {
    text += (text.size() == piece.name.size() ? ":" : ",") + key + "=" + value;
  }
  return text;
}

}  // namespace kvreplay
