// Deflated bytes of a known size.
#pragma once
#include <cstddef>
#include <span>

namespace kvreplay {

enum class Deflated { zlib, raw };  // with zlib's header and checksum, or without

// Fills `out`; false if `in` is damaged, or does not inflate to exactly so many bytes: what follows is never unpacked.
bool inflate_exactly(std::span<const std::byte> in, std::span<std::byte> out, Deflated form);

}  // namespace kvreplay
