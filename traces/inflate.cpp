#include "traces/inflate.hpp"

#include <zlib.h>

#include <algorithm>

namespace kvreplay {

bool inflate_exactly(std::span<const std::byte> in, std::span<std::byte> out, Deflated form) {
  z_stream stream{};
  if (::inflateInit2(&stream, form == Deflated::raw ? -MAX_WBITS : MAX_WBITS) != Z_OK) {
    return false;
  }
  std::size_t read = 0, written = 0;
  int status = Z_OK;
  std::byte overflow{};  // where data that is longer than it should be would go
  while (status == Z_OK) {
    constexpr std::size_t kMax = std::size_t{1} << 30;  // zlib counts in 32 bits
    const std::size_t give = std::min(in.size() - read, kMax), room = std::min(out.size() - written, kMax);
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(in.data() + read));
    stream.avail_in = static_cast<uInt>(give);
    stream.next_out = reinterpret_cast<Bytef*>(room > 0 ? out.data() + written : &overflow);
    stream.avail_out = static_cast<uInt>(room > 0 ? room : 1);
    const uInt had = stream.avail_out;
    status = ::inflate(&stream, Z_NO_FLUSH);
    read += give - stream.avail_in;
    const std::size_t made = had - stream.avail_out;
    if (room == 0 && made > 0) {
      status = Z_BUF_ERROR;
    }
    written += room > 0 ? made : 0;
  }
  ::inflateEnd(&stream);
  return status == Z_STREAM_END && written == out.size();
}

}  // namespace kvreplay
