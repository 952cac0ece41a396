// What a file may ask for. Everything that is allocated for a file stands in a stated relation to the file's own size,
// whatever the file claims (docs/trace_format.md, "Limits").
#pragma once
#include <cstdint>
#include <limits>

namespace kvreplay::limits {

// A limit that grows with the file: `per_byte` bytes for each of its bytes, and `slack` for small files.
struct Allowance {
  std::uint64_t per_byte, slack;
  constexpr std::uint64_t of(std::uint64_t file_bytes) const {
    return file_bytes > (std::numeric_limits<std::uint64_t>::max() - slack) / per_byte
               ? std::numeric_limits<std::uint64_t>::max()
               : file_bytes * per_byte + slack;
  }
};

inline constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
inline constexpr Allowance kColumn{16, 16 * kMiB};  // memory of one column, which is read whole: tokens, indexes, texts
inline constexpr Allowance kArrays{64, 64 * kMiB};  // what all bulk arrays together stand for, as stored elements
inline constexpr std::uint64_t kMaxChunkBytes = 256 * kMiB;          // one chunk, inflated
inline constexpr std::uint64_t kMaxChunks = std::uint64_t{1} << 14;  // of one array: the library finds each by a search
inline constexpr std::uint64_t kMaxInflation = 1100;                 // deflate cannot exceed 1032
inline constexpr std::uint64_t kMaxAttributeBytes = 64 * kMiB;       // larger ones are not metadata any more

}  // namespace kvreplay::limits
