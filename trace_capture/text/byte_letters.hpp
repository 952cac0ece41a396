// GPT-2's alphabet for bytes: every byte as one printable character, so that a vocabulary of texts can hold any bytes.
// Bytes that are printable in Latin-1 stand for themselves, the others for U+0100 and up.
#pragma once
#include <optional>
#include <string>
#include <string_view>

namespace kvreplay::text {

std::string byte_letters(std::string_view bytes);

// The bytes that letters stand for; nullopt if some character is no such letter.
std::optional<std::string> bytes_of_letters(std::string_view letters);

}  // namespace kvreplay::text
