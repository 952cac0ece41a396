// Where a bulk array claims to lie: offsets, sizes, chunks and filters of any kind over a small file.
#include "tests/fuzz/fuzz.hpp"
#include "traces/errors.hpp"
#include "traces/stored_array.hpp"

using namespace kvreplay;

namespace {

// Mostly small, sometimes at an edge.
std::uint64_t size_from(fuzz::Input& input) {
  constexpr std::uint64_t kEdges[] = {
      0, 1, 4096, 1U << 16, 1U << 28, ~std::uint32_t{0}, std::uint64_t{1} << 40, ~std::uint64_t{0} - 7};
  const std::uint8_t kind = input.byte();
  return kind < 200 ? kind % 40U : kind < 240 ? input.number(2) : kEdges[kind % 8];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr ElementType kTypes[] = {ElementType::f16, ElementType::bf16, ElementType::f32};
  const std::filesystem::path path = fuzz::scratch() / "in.bin";
  fuzz::write_file(path, {reinterpret_cast<const char*>(data), size});
  const auto file = std::make_shared<const FileBytes>(path);
  fuzz::Input input(data, size);
  std::vector<StoredArray> arrays;
  for (int i = 0; i < 3; ++i) {
    fuzz::answered<TraceError, hdf5::StorageError>([&] {
      const ElementType type = input.pick(kTypes);
      // As the reader gives them: within the limits of the format, and a grid with a place for each extent.
      const hdf5::Shape dims = {1 + input.below(8), input.number(2) % 512, 1 + input.below(16)};
      hdf5::Storage storage;
      std::size_t n_extents = 1;
      if (input.flag()) {
        storage.shuffle = input.flag();
        storage.deflate = input.flag();
        for (const std::uint64_t dim : dims) {
          const std::uint64_t chunk = std::max<std::uint64_t>(1, size_from(input));
          storage.chunk.push_back(chunk);
          n_extents *= dim / chunk + (dim % chunk != 0 ? 1 : 0);
        }
        if (n_extents > 256) {
          return;
        }
      }
      for (std::size_t e = 0; e < n_extents; ++e) {
        storage.extents.push_back({size_from(input), size_from(input)});
      }
      if (storage.chunk.empty() && input.flag()) {  // the right size, so that more than the first check is reached
        storage.extents[0].bytes = dims[0] * dims[1] * dims[2] * size_of(type);
      }
      const std::uint64_t n_valid = dims[1] == 0 ? 0 : input.number(2) % (dims[1] + 1);
      arrays.emplace_back(file, "in: /a", type, dims, std::move(storage), n_valid);
    });
  }
  std::vector<const StoredArray*> all;
  for (const StoredArray& array : arrays) {
    all.push_back(&array);
  }
  fuzz::answered<TraceError>([&] { check_extents(all, *file); });
  for (const StoredArray& array : arrays) {
    const std::uint64_t head = input.below(9), begin = input.number(2), end = begin + input.number(1);
    std::vector<float> out((end - begin) * array.width());
    std::vector<std::byte> raw((end - begin) * array.row_bytes());
    fuzz::answered<TraceError>([&] { array.read(head, begin, end, out); });
    fuzz::answered<TraceError>([&] { array.read(array.n_heads() - 1, 0, array.n_rows(), out); });
    fuzz::answered<TraceError>([&] { array.read_raw(head, begin, end, raw); });
    out.resize(array.n_rows() * array.width());
    fuzz::answered<TraceError>([&] { array.read(0, 0, array.n_rows(), out); });
  }
  return 0;
}
