// Reads NumPy's .npz (a zip of .npy files, stored or deflated) without NumPy. Written for files
// from strangers: every size is checked against the file before anything is allocated.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "traces/errors.hpp"
#include "traces/stored_array.hpp"

namespace kvreplay {

struct NpyArray {
  std::string where;  // "in.npz: q0"
  char kind = 'f';    // NumPy's: f float, i int, u unsigned, b bool, V raw bytes
  std::size_t item_bytes = 0;
  std::vector<std::uint64_t> shape;  // C order
  std::vector<std::byte> data;

  std::uint64_t n_elements() const;
  std::vector<std::int64_t> integers() const;  // TraceError unless kind is i, u or b
  // float16, float32, float64; two raw or unsigned bytes are taken for bfloat16, which NumPy lacks.
  std::vector<float> floats() const;
  ElementType element() const;  // the element type that holds these floats (float64 becomes f32)
};

class Npz {
 public:
  explicit Npz(const std::filesystem::path& path);
  std::vector<std::string> names() const;  // without ".npy", sorted
  bool has(const std::string& name) const { return entries_.contains(name); }
  NpyArray load(const std::string& name) const;

 private:
  struct Entry {
    std::uint64_t offset = 0, stored_bytes = 0, bytes = 0;  // offset of the local header
    std::uint32_t crc = 0;
    int method = 0;  // 0 stored, 8 deflated
  };
  void check_entries() const;
  std::vector<std::byte> contents(const std::string& name) const;

  std::filesystem::path path_;
  std::unique_ptr<const FileBytes> file_;
  std::map<std::string, Entry> entries_;
};

}  // namespace kvreplay
