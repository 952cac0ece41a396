// UTF-8, read and written one code point at a time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kvreplay::text {

// Bytes of the well-formed character at the front of text (no surrogates, nothing overlong, at most U+10FFFF);
// 0 if there is none.
std::size_t character_size(std::string_view text);

// Where text stops being UTF-8; text.size() if it never does.
std::size_t valid_until(std::string_view text);

// The code point at the front of text, which is well-formed and not empty.
char32_t code_point(std::string_view text);

// Bytes of the character that ends text, which is well-formed and not empty.
std::size_t last_character_size(std::string_view text);

void append(std::string& text, char32_t code_point);

// text with every ill-formed part as U+FFFD: one for each longest start of a character, as the Unicode Standard
// recommends (chapter 3.9, "Substitution of Maximal Subparts").
std::string with_replacements(std::string_view bytes);

}  // namespace kvreplay::text
