#include "trace_capture/text/byte_letters.hpp"

#include <array>
#include <cstdint>

#include "trace_capture/text/utf8.hpp"

namespace kvreplay::text {
namespace {

constexpr std::size_t kEnd = 0x144;  // one beyond the last letter

constexpr bool stands_for_itself(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
}

constexpr std::array<char32_t, 256> make_letters() {
  std::array<char32_t, 256> letters{};
  char32_t next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    letters[byte] = stands_for_itself(byte) ? byte : next++;
  }
  return letters;
}
constexpr std::array<char32_t, 256> kLetters = make_letters();

constexpr std::array<std::int16_t, kEnd> make_bytes() {
  std::array<std::int16_t, kEnd> bytes{};
  bytes.fill(-1);
  for (unsigned byte = 0; byte < 256; ++byte) {
    bytes[kLetters[byte]] = static_cast<std::int16_t>(byte);
  }
  return bytes;
}
constexpr std::array<std::int16_t, kEnd> kBytes = make_bytes();

}  // namespace

std::string byte_letters(std::string_view bytes) {
  std::string letters;
  letters.reserve(bytes.size() + bytes.size() / 4);
  for (const char byte : bytes) {
    append(letters, kLetters[static_cast<unsigned char>(byte)]);
  }
  return letters;
}

std::optional<std::string> bytes_of_letters(std::string_view letters) {
  std::string bytes;
  while (!letters.empty()) {
    const char32_t letter = code_point(letters);
    if (letter >= kEnd || kBytes[letter] < 0) {
      return std::nullopt;
    }
    bytes += static_cast<char>(static_cast<unsigned char>(kBytes[letter]));
    letters.remove_prefix(character_size(letters));
  }
  return bytes;
}

}  // namespace kvreplay::text
