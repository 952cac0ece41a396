#include "trace_capture/text/utf8.hpp"

namespace kvreplay::text {
namespace {

unsigned byte_at(std::string_view text, std::size_t i) { return static_cast<unsigned char>(text[i]); }

// The longest start of a well-formed character at the front of text, and whether it is whole.
struct Start {
  std::size_t size = 0;
  bool whole = false;
};

// Table 3-7 of the Unicode Standard: only the second byte has bounds of its own.
Start start_of_character(std::string_view text) {
  if (text.empty()) {
    return {};
  }
  const unsigned first = byte_at(text, 0);
  if (first < 0x80) {
    return {1, true};
  }
  std::size_t size = 0;
  unsigned low = 0x80, high = 0xBF;
  if (first >= 0xC2 && first <= 0xDF) {
    size = 2;
  } else if (first >= 0xE0 && first <= 0xEF) {
    size = 3;
    low = first == 0xE0 ? 0xA0 : 0x80;
    high = first == 0xED ? 0x9F : 0xBF;
  } else if (first >= 0xF0 && first <= 0xF4) {
    size = 4;
    low = first == 0xF0 ? 0x90 : 0x80;
    high = first == 0xF4 ? 0x8F : 0xBF;
  } else {
    return {};
  }
  for (std::size_t i = 1; i < size; ++i) {
    if (i >= text.size() || byte_at(text, i) < low || byte_at(text, i) > high) {
      return {i, false};
    }
    low = 0x80;
    high = 0xBF;
  }
  return {size, true};
}

}  // namespace

std::size_t character_size(std::string_view text) {
  const Start start = start_of_character(text);
  return start.whole ? start.size : 0;
}

std::size_t valid_until(std::string_view text) {
  std::size_t i = 0;
  while (i < text.size()) {
    const std::size_t size = character_size(text.substr(i));
    if (size == 0) {
      return i;
    }
    i += size;
  }
  return i;
}

char32_t code_point(std::string_view text) {
  const unsigned first = byte_at(text, 0);
  if (first < 0x80) {
    return first;
  }
  const std::size_t size = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  char32_t value = first & (0x7FU >> size);
  for (std::size_t i = 1; i < size; ++i) {
    value = value << 6 | (byte_at(text, i) & 0x3FU);
  }
  return value;
}

std::size_t last_character_size(std::string_view text) {
  std::size_t size = 1;
  while (size < text.size() && (byte_at(text, text.size() - size) & 0xC0U) == 0x80) {
    ++size;
  }
  return size;
}

void append(std::string& text, char32_t code_point) {
  const auto put = [&text](char32_t byte) { text += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | code_point >> 6);
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3F));
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

std::string with_replacements(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  while (!bytes.empty()) {
    const Start start = start_of_character(bytes);
    if (start.whole) {
      text += bytes.substr(0, start.size);
    } else {
      text += "\uFFFD";
    }
    bytes.remove_prefix(start.size == 0 ? 1 : start.size);
  }
  return text;
}

}  // namespace kvreplay::text
