// HDF5, wrapped once: everything above speaks of files, groups, datasets and attributes, and never
// sees a C handle.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvreplay::hdf5 {

// Any failure of the library, as one sentence that names file, object and what the library found.
class StorageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Type { f16, bf16, f32, f64, i8, i16, i32, i64, u8, u16, u32, u64, text, other };
std::size_t size_of(Type type);  // bytes of one element; 0 for text and other
std::string_view name_of(Type type);
bool is_integer(Type type);

using Shape = std::vector<std::uint64_t>;
std::string to_string(const Shape& shape);  // "(4, 2048, 64)"
std::uint64_t n_elements(const Shape& shape);

// How a new dataset lies in the file.
struct Layout {
  Shape chunk;            // empty = contiguous
  int deflate = 0;        // 1..9; chunked only, always behind a byte shuffle
  bool reserved = false;  // contiguous: space is given at creation, so that it has an offset before any write
};

// Where the bytes of an existing dataset lie, so that they can be read outside the library and its
// global lock.
struct Extent {
  std::uint64_t offset = 0, bytes = 0;  // bytes 0 = never written
};
struct Storage {
  Shape chunk;  // empty = contiguous
  bool shuffle = false, deflate = false;
  std::vector<Extent> extents;  // contiguous: one; chunked: one per place of the row-major chunk grid
};

// Owns one reference to a library object.
class Handle {
 public:
  Handle() = default;
  explicit Handle(std::int64_t id) : id_(id) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    return *this;
  }
  ~Handle();
  std::int64_t get() const { return id_; }
  std::int64_t release() { return std::exchange(id_, -1); }

 private:
  std::int64_t id_ = -1;
};

// What groups and datasets share: a place in a file, and attributes.
class Object {
 public:
  const std::string& where() const { return where_; }  // "trace.h5: /model", for messages

  std::vector<std::string> attribute_names() const;  // sorted
  bool has_attribute(const std::string& name) const;
  std::string text(const std::string& name) const;
  std::int64_t integer(const std::string& name) const;
  double real(const std::string& name) const;  // an integer is accepted
  std::vector<std::int64_t> integers(const std::string& name) const;
  std::vector<double> reals(const std::string& name) const;

  // Setting replaces; a text for which there is room is overwritten in place.
  void reserve_text(const std::string& name, std::size_t bytes) const;
  void set(const std::string& name, std::string_view text) const;
  void set(const std::string& name, const char* text) const { set(name, std::string_view(text)); }
  void set(const std::string& name, std::int64_t value) const;
  void set(const std::string& name, int value) const { set(name, std::int64_t{value}); }
  void set(const std::string& name, double value) const;
  void set(const std::string& name, std::span<const std::int32_t> values) const;
  void set(const std::string& name, std::span<const double> values) const;

 protected:
  Object(Handle handle, std::string where) : handle_(std::move(handle)), where_(std::move(where)) {}
  Handle handle_;
  std::string where_;
};

class Dataset : public Object {
 public:
  Type type() const;
  Shape shape() const;
  std::size_t text_bytes() const;  // width of a fixed-length text element; 0 where lengths vary
  Storage storage() const;         // refuses filters, layouts and links that cannot be read outside the library

  // The whole dataset, or the block [start, start + count) of it, row-major, as stored: no
  // conversion.
  void write(std::span<const std::byte> data) const;
  void write_block(const Shape& start, const Shape& count, std::span<const std::byte> data) const;
  void read(std::span<std::byte> data) const;
  void read_block(const Shape& start, const Shape& count, std::span<std::byte> data) const;

  // Whole 1-D columns, converted by the library and checked for range.
  std::vector<std::int64_t> read_integers() const;
  std::vector<double> read_reals() const;
  std::vector<std::string> read_texts() const;

 private:
  friend class Group;
  std::uint64_t column_length(std::uint64_t each) const;  // of a column whose values take `each` bytes of memory
  Dataset(Handle handle, std::string where) : Object(std::move(handle), std::move(where)) {}
};

class Group : public Object {
 public:
  std::vector<std::string> children() const;  // sorted; a link that leaves the file is an error
  bool has(const std::string& name) const;
  Group create_group(const std::string& name) const;
  Group group(const std::string& name) const;
  Dataset create(const std::string& name, Type type, const Shape& shape, const Layout& layout = {}) const;
  // A column of fixed-length, null padded UTF-8 texts.
  Dataset create_texts(const std::string& name, std::size_t width, std::uint64_t n, const Layout& layout = {}) const;
  Dataset dataset(const std::string& name) const;
  // Commits `type` under a name, so that a reader in any language can look it up.
  void commit_type(const std::string& name, Type type) const;

  // 1-D columns in one call. Texts are stored with fixed length (the longest), null padded UTF-8.
  Dataset write_column(const std::string& name, std::span<const std::string> values) const;
  Dataset write_column(const std::string& name, std::span<const std::int32_t> values) const;
  Dataset write_column(const std::string& name, std::span<const std::int64_t> values) const;
  Dataset write_column(const std::string& name, std::span<const double> values) const;
  Dataset write_column(const std::string& name, std::span<const float> values) const;
  Dataset write_column(const std::string& name, std::span<const std::uint8_t> values) const;

 private:
  friend class File;
  Group(Handle handle, std::string where) : Object(std::move(handle), std::move(where)) {}
};

// A file. `create` writes under `<path>.part`; the final name appears with `publish`, whole or not
// at all. A file that is destroyed unpublished leaves the .part file to its owner (see `discard`).
class File {
 public:
  static File create(const std::filesystem::path& path);
  static File create(const std::filesystem::path& path,
                     const std::filesystem::path& part);      // under another name
  static File open(const std::filesystem::path& path);        // read only, never locks
  static File open_write(const std::filesystem::path& path);  // an existing file, in place

  const Group& root() const { return root_; }
  void close();    // flushes; throws where the destructor could only be silent
  void publish();  // close, fsync, rename to the final name, fsync of the folder
  void discard();  // close and remove what `create` made
  static std::filesystem::path part_of(const std::filesystem::path& path);

 private:
  File(Handle handle, Group root, std::filesystem::path path, std::filesystem::path part)
      : handle_(std::move(handle)), root_(std::move(root)), path_(std::move(path)), part_(std::move(part)) {}
  Handle handle_;
  Group root_;
  std::filesystem::path path_, part_;  // part_ empty where nothing is to be published
};

// fsync of a closed file or of a folder.
void sync(const std::filesystem::path& path);
// The same, and rename to its final name.
void publish_file(const std::filesystem::path& part, const std::filesystem::path& path);

template <typename T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span<const T>(values));
}
template <typename T>
std::span<std::byte> writable_bytes_of(std::vector<T>& values) {
  return std::as_writable_bytes(std::span<T>(values));
}

}  // namespace kvreplay::hdf5
