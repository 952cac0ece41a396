#include "traces/stored_array.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <system_error>

#include "traces/errors.hpp"
#include "traces/inflate.hpp"
#include "traces/limits.hpp"

namespace kvreplay {
namespace {

constexpr std::size_t kPiece = std::size_t{256} << 10;  // bytes per pread: stays in the second-level cache

std::string errno_text() { return std::generic_category().message(errno); }

struct stat status_of(int fd, const std::filesystem::path& path) {
  struct stat status {};
  if (::fstat(fd, &status) != 0) {
    throw TraceError(path.string() + ": cannot be examined (" + errno_text() + ")");
  }
  return status;
}

}  // namespace

FileBytes::FileBytes(const std::filesystem::path& path) : path_(path) {
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) {
    throw TraceError(errno == ENOENT ? path.string() + " does not exist"
                                     : path.string() + ": cannot be opened (" + errno_text() + ")");
  }
  const struct stat status = status_of(fd_, path);
  size_ = static_cast<std::uint64_t>(status.st_size);
  inode_ = status.st_ino;
  mtime_s_ = status.st_mtim.tv_sec;
  mtime_ns_ = status.st_mtim.tv_nsec;
}

FileBytes::~FileBytes() {
  if (fd_ >= 0) {
    ::close(fd_);
  }
}

void FileBytes::read(std::uint64_t offset, std::span<std::byte> out) const {
  std::size_t done = 0;
  while (done < out.size()) {
    const ssize_t got = ::pread(fd_, out.data() + done, out.size() - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got < 0) {
      throw TraceError(path_.string() + ": cannot be read at byte " + std::to_string(offset + done) + " (" +
                       errno_text() + ")");
    }
    if (got == 0) {
      throw TraceError(fmt::format("{}: ended at byte {} while it was read; it had {} bytes when it was opened",
                                   path_.string(), offset + done, size_));
    }
    done += static_cast<std::size_t>(got);
  }
}

void FileBytes::check_unchanged() const {
  struct stat status {};
  if (::stat(path_.c_str(), &status) != 0) {
    throw TraceError(path_.string() + ": is gone since it was opened (" + errno_text() + ")");
  }
  if (static_cast<std::uint64_t>(status.st_size) != size_) {
    throw TraceError(fmt::format("{}: changed while it was in use: {} bytes at open, {} now", path_.string(), size_,
                                 status.st_size));
  }
  if (status.st_ino != inode_ || status.st_mtim.tv_sec != mtime_s_ || status.st_mtim.tv_nsec != mtime_ns_) {
    throw TraceError(path_.string() + ": changed while it was in use: it was written again after it was opened");
  }
}

namespace {

std::atomic<std::uint64_t> next_serial{1};

// The last chunk that a thread has decoded. Engines read rows in blocks, so the next rows are
// usually in it.
struct ChunkMemory {
  std::uint64_t serial = 0, index = 0;
  std::vector<std::byte> stored, shuffled, data;
};

ChunkMemory& chunk_memory() {
  static thread_local ChunkMemory memory;
  return memory;
}

// Inverse of HDF5's byte shuffle: byte b of element i was moved to b * n + i.
void unshuffle(std::span<const std::byte> in, std::size_t element, std::span<std::byte> out) {
  const std::size_t n = in.size() / element;
  if (element == 2) {
    const std::byte* low = in.data();
    const std::byte* high = in.data() + n;
    for (std::size_t i = 0; i < n; ++i) {
      out[2 * i] = low[i];
      out[2 * i + 1] = high[i];
    }
  } else {
    for (std::size_t b = 0; b < element; ++b) {
      const std::byte* plane = in.data() + b * n;
      for (std::size_t i = 0; i < n; ++i) {
        out[element * i + b] = plane[i];
      }
    }
  }
}

}  // namespace

StoredArray::StoredArray(std::shared_ptr<const FileBytes> file, std::string where, ElementType type, hdf5::Shape dims,
                         hdf5::Storage storage, std::uint64_t n_valid)
    : file_(std::move(file)),
      where_(std::move(where)),
      type_(type),
      dims_(std::move(dims)),
      storage_(std::move(storage)),
      n_valid_(n_valid),
      serial_(next_serial++) {
  const std::uint64_t row = dims_[2] * size_of(type_);
  if (!chunked()) {
    const std::uint64_t bytes = dims_[0] * dims_[1] * row;
    if (bytes > 0 && storage_.extents[0].bytes == 0) {
      throw TraceError(where_ + ": has no data in the file");
    }
    if (storage_.extents[0].bytes != bytes) {
      throw TraceError(fmt::format("{}: expected {} bytes, found {}", where_, bytes, storage_.extents[0].bytes));
    }
  } else {
    const hdf5::Shape& chunk = storage_.chunk;
    const std::uint64_t n_elements = hdf5::n_elements(chunk);
    const std::uint64_t most = std::min(limits::kMaxChunkBytes, limits::kArrays.of(file_->size()));
    if (n_elements > most / size_of(type_)) {
      throw TraceError(fmt::format("{}: has chunks of {} elements of {} bytes; at most {} bytes are allowed", where_,
                                   n_elements, size_of(type_), most));
    }
    const std::uint64_t chunk_bytes = n_elements * size_of(type_);
    for (std::size_t d = 0; d < 3; ++d) {
      grid_.push_back(dims_[d] / chunk[d] + (dims_[d] % chunk[d] != 0 ? 1 : 0));
    }
    for (const hdf5::Extent& extent : storage_.extents) {
      const bool fits =
          storage_.deflate ? chunk_bytes / limits::kMaxInflation <= extent.bytes : extent.bytes == chunk_bytes;
      if (extent.bytes > 0 && !fits) {
        throw TraceError(fmt::format("{}: a chunk of {} bytes cannot hold the {} bytes that it stands for", where_,
                                     extent.bytes, chunk_bytes));
      }
    }
  }
  for (const hdf5::Extent& extent : storage_.extents) {
    if (extent.offset > file_->size() || extent.bytes > file_->size() - extent.offset) {
      throw TraceError(fmt::format("{}: lies at bytes {} to {} of a file of {} bytes; the file is truncated or damaged",
                                   where_, extent.offset, extent.offset + extent.bytes, file_->size()));
    }
  }
}

std::uint64_t StoredArray::valid_bytes() const { return dims_[0] * n_valid_ * row_bytes(); }

std::uint64_t StoredArray::stored_bytes() const {
  std::uint64_t bytes = 0;
  for (const hdf5::Extent& extent : storage_.extents) {
    bytes += extent.bytes;
  }
  return bytes;
}

std::span<const std::byte> StoredArray::chunk(std::uint64_t index) const {
  ChunkMemory& memory = chunk_memory();
  if (memory.serial == serial_ && memory.index == index) {
    return memory.data;
  }
  memory.serial = 0;  // nothing is valid until the chunk is whole
  const hdf5::Extent extent = storage_.extents[index];
  if (extent.bytes == 0) {
    throw TraceError(where_ + ": a chunk within the valid tokens was never written");
  }
  const std::size_t n = static_cast<std::size_t>(hdf5::n_elements(storage_.chunk)) * size_of(type_);
  memory.data.resize(n);
  std::vector<std::byte>& unfiltered = storage_.shuffle ? memory.shuffled : memory.data;
  unfiltered.resize(n);
  if (storage_.deflate) {
    memory.stored.resize(static_cast<std::size_t>(extent.bytes));
    file_->read(extent.offset, memory.stored);
    if (!inflate_exactly(memory.stored, unfiltered, Deflated::zlib)) {
      throw TraceError(fmt::format("{}: a chunk does not inflate to its {} bytes", where_, n));
    }
  } else {
    file_->read(extent.offset, unfiltered);
  }
  if (storage_.shuffle) {
    unshuffle(memory.shuffled, size_of(type_), memory.data);
  }
  memory.serial = serial_;
  memory.index = index;
  return memory.data;
}

void StoredArray::read_chunked(std::uint64_t head, std::uint64_t begin, std::uint64_t end, std::byte* out) const {
  const hdf5::Shape& shape = storage_.chunk;
  const std::size_t element = size_of(type_);
  const std::size_t chunk_row = static_cast<std::size_t>(shape[2]) * element;
  for (std::uint64_t row_chunk = begin / shape[1]; row_chunk * shape[1] < end; ++row_chunk) {
    const std::uint64_t first = std::max(begin, row_chunk * shape[1]);
    const std::uint64_t last = std::min(end, (row_chunk + 1) * shape[1]);
    for (std::uint64_t column_chunk = 0; column_chunk < grid_[2]; ++column_chunk) {
      const std::uint64_t index = (head / shape[0] * grid_[1] + row_chunk) * grid_[2] + column_chunk;
      const std::span<const std::byte> data = chunk(index);
      const std::uint64_t columns = std::min(shape[2], dims_[2] - column_chunk * shape[2]);
      const std::byte* from = data.data() + (head % shape[0] * shape[1] + (first - row_chunk * shape[1])) * chunk_row;
      std::byte* to = out + (first - begin) * row_bytes() + column_chunk * chunk_row;
      if (grid_[2] == 1 && columns == shape[2]) {
        std::memcpy(to, from, (last - first) * chunk_row);
        continue;
      }
      for (std::uint64_t row = first; row < last; ++row, from += chunk_row, to += row_bytes()) {
        std::memcpy(to, from, columns * element);
      }
    }
  }
}

void StoredArray::check_range(std::uint64_t head, std::uint64_t begin, std::uint64_t end,
                              std::size_t n_elements) const {
  if (head >= dims_[0] || begin > end || end > n_valid_) {
    throw TraceError(fmt::format("{}: rows {} to {} of head {} were asked for, but it has {} heads of {} rows", where_,
                                 begin, end, head, dims_[0], n_valid_));
  }
  if (n_elements != (end - begin) * dims_[2]) {
    throw TraceError(
        fmt::format("{}: {} rows of {} elements do not fit a buffer of {}", where_, end - begin, dims_[2], n_elements));
  }
}

void StoredArray::read_raw(std::uint64_t head, std::uint64_t begin, std::uint64_t end, std::span<std::byte> out) const {
  check_range(head, begin, end, out.size() / size_of(type_));
  if (begin == end) {
    return;
  }
  if (chunked()) {
    read_chunked(head, begin, end, out.data());
  } else {
    file_->read(storage_.extents[0].offset + (head * dims_[1] + begin) * row_bytes(), out);
  }
}

void StoredArray::read(std::uint64_t head, std::uint64_t begin, std::uint64_t end, std::span<float> out,
                       std::span<const std::int32_t> row_numbers) const {
  check_range(head, begin, end, out.size());
  bool finite = true;
  if (type_ == ElementType::f32) {
    read_raw(head, begin, end, std::as_writable_bytes(out));
    finite = widen(type_, reinterpret_cast<const std::byte*>(out.data()), out);
  } else {
    static thread_local std::vector<std::byte> piece;
    const std::uint64_t rows = std::max<std::uint64_t>(1, kPiece / row_bytes());
    for (std::uint64_t row = begin; row < end; row += rows) {
      const std::uint64_t last = std::min(end, row + rows);
      piece.resize((last - row) * row_bytes());
      read_raw(head, row, last, piece);
      finite = widen(type_, piece.data(), out.subspan((row - begin) * dims_[2], (last - row) * dims_[2])) && finite;
    }
  }
  if (!finite) {
    not_finite(head, begin, out, row_numbers);
  }
}

void StoredArray::not_finite(std::uint64_t head, std::uint64_t begin, std::span<const float> values,
                             std::span<const std::int32_t> row_numbers) const {
  const auto bad = std::find_if(values.begin(), values.end(), [](float x) { return !std::isfinite(x); });
  const std::uint64_t i = static_cast<std::uint64_t>(bad - values.begin());
  const std::uint64_t row = begin + i / dims_[2];
  const std::int64_t number = row < row_numbers.size() ? row_numbers[row] : static_cast<std::int64_t>(row);
  throw TraceError(fmt::format("{}: expected finite values, found {} at head {}, token {}, channel {}", where_, *bad,
                               head, number, i % dims_[2]));
}

void check_extents(std::span<const StoredArray* const> arrays, const FileBytes& file) {
  struct Piece {
    hdf5::Extent extent;
    const StoredArray* owner;
  };
  std::vector<Piece> pieces;
  for (const StoredArray* array : arrays) {
    for (const hdf5::Extent& extent : array->storage().extents) {
      if (extent.bytes > 0) {
        pieces.push_back({extent, array});
      }
    }
  }
  std::sort(pieces.begin(), pieces.end(),
            [](const Piece& a, const Piece& b) { return a.extent.offset < b.extent.offset; });
  for (std::size_t i = 1; i < pieces.size(); ++i) {
    if (pieces[i - 1].extent.offset + pieces[i - 1].extent.bytes > pieces[i].extent.offset) {
      throw TraceError(fmt::format("{} and {} overlap at byte {} of {}", pieces[i - 1].owner->where(),
                                   pieces[i].owner->where(), pieces[i].extent.offset, file.path().string()));
    }
  }
}

}  // namespace kvreplay
