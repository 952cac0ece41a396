// One bulk array of a trace, read straight from the file: where its rows lie is learnt once, then
// every read is a pread (and, for chunks, our own inflate and unshuffle) that needs no library and
// no lock.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "traces/hdf5.hpp"
#include "traces/widen.hpp"

namespace kvreplay {

// An open file descriptor with the size and time it had at open.
class FileBytes {
 public:
  explicit FileBytes(const std::filesystem::path& path);
  ~FileBytes();
  FileBytes(const FileBytes&) = delete;
  FileBytes& operator=(const FileBytes&) = delete;

  std::uint64_t size() const { return size_; }
  const std::filesystem::path& path() const { return path_; }
  void read(std::uint64_t offset,
            std::span<std::byte> out) const;  // TraceError if the file became shorter
  void check_unchanged() const;               // TraceError if size, time or file changed

 private:
  std::filesystem::path path_;
  int fd_ = -1;
  std::uint64_t size_ = 0, inode_ = 0;
  std::int64_t mtime_s_ = 0, mtime_ns_ = 0;
};

class StoredArray {
 public:
  // `dims` [n_heads, n_rows, width] is the dataset's shape seen as three dimensions, and so is
  // storage.chunk. `n_valid` rows of each head may be read.
  StoredArray(std::shared_ptr<const FileBytes> file, std::string where, ElementType type, hdf5::Shape dims,
              hdf5::Storage storage, std::uint64_t n_valid);

  ElementType type() const { return type_; }
  std::uint64_t n_heads() const { return dims_[0]; }
  std::uint64_t n_rows() const { return n_valid_; }
  std::uint64_t width() const { return dims_[2]; }
  std::size_t row_bytes() const { return static_cast<std::size_t>(dims_[2]) * size_of(type_); }
  const std::string& where() const { return where_; }
  bool chunked() const { return !storage_.chunk.empty(); }
  const hdf5::Storage& storage() const { return storage_; }
  std::uint64_t valid_bytes() const;   // of the rows that may be read, inflated
  std::uint64_t stored_bytes() const;  // in the file

  // Rows [begin, end) of one head as stored; out is (end - begin, width) of type().
  void read_raw(std::uint64_t head, std::uint64_t begin, std::uint64_t end, std::span<std::byte> out) const;
  // The same as float32. A value that is not finite is a TraceError that names head and token;
  // `row_numbers` gives the token of each row where they are not the same.
  void read(std::uint64_t head, std::uint64_t begin, std::uint64_t end, std::span<float> out,
            std::span<const std::int32_t> row_numbers = {}) const;

 private:
  void check_range(std::uint64_t head, std::uint64_t begin, std::uint64_t end, std::size_t n_elements) const;
  std::span<const std::byte> chunk(std::uint64_t index) const;  // valid until this thread reads another chunk
  void read_chunked(std::uint64_t head, std::uint64_t begin, std::uint64_t end, std::byte* out) const;
  [[noreturn]] void not_finite(std::uint64_t head, std::uint64_t begin, std::span<const float> values,
                               std::span<const std::int32_t> row_numbers) const;

  std::shared_ptr<const FileBytes> file_;
  std::string where_;
  ElementType type_;
  hdf5::Shape dims_, grid_;  // grid_: chunks along each dimension
  hdf5::Storage storage_;
  std::uint64_t n_valid_;
  std::uint64_t serial_;  // distinguishes this array in the per-thread chunk memory
};

// Refuses arrays that lie on top of each other or outside the file.
void check_extents(std::span<const StoredArray* const> arrays, const FileBytes& file);

}  // namespace kvreplay
