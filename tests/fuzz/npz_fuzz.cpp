// The .npz reader and import: the archive as raw bytes, or put together from pieces with right checksums, so that what
// lies behind them is reached. What import writes, the reader reads.
#include <zlib.h>

#include "tests/fuzz/fuzz.hpp"
#include "traces/import.hpp"
#include "traces/info.hpp"
#include "traces/verify.hpp"

using namespace kvreplay;

namespace {

void put(std::string& out, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) {
    out += static_cast<char>(i < 8 ? value >> (8 * i) : 0);
  }
}

std::string deflated(const std::string& data) {
  z_stream stream{};
  if (::deflateInit2(&stream, 1, Z_DEFLATED, -MAX_WBITS, 8, Z_DEFAULT_STRATEGY) != Z_OK) {
    return data;
  }
  std::string out(::deflateBound(&stream, data.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data.data()));
  stream.avail_in = static_cast<uInt>(data.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  ::deflate(&stream, Z_FINISH);
  out.resize(stream.total_out);
  ::deflateEnd(&stream);
  return out;
}

// One array: usually what its name needs, in a shape that others may agree with.
struct Array {
  std::string name, descr, shape;
  std::string data;
};

Array array_from(fuzz::Input& input) {
  constexpr const char* kNames[] = {"token_ids", "k0", "v0", "q0", "position", "q_index", "out_index", "out0",
                                    "w_o0",      "k3", "v3", "q3", "w_o3",     "out3",    "k007",      "x"};
  constexpr const char* kTypes[] = {"<f2", "<f4", "<f8", "<u2", "|V2", "<i4", "<i8", "|u1", "|b1", ">f4", "<U4", "|O"};
  Array array;
  const std::uint8_t kind = input.byte();
  array.name = kind == 255 ? input.text(input.below(12)) : kNames[kind % 16];
  const bool numbers = array.name == "token_ids" || array.name == "position" || array.name.ends_with("_index");
  const std::uint8_t type = input.byte();
  array.descr = type < 200 ? (numbers ? "<i4" : "<f4") : kTypes[type % 12];
  const std::size_t n_tokens = 1 + input.below(4), heads = 1 + input.below(3), width = 1 + input.below(4);
  std::size_t n = numbers ? n_tokens : heads * n_tokens * width;
  array.shape =
      numbers ? "(" + std::to_string(n_tokens) + ",)"
              : "(" + std::to_string(heads) + ", " + std::to_string(n_tokens) + ", " + std::to_string(width) + ")";
  if (array.name.starts_with("w_o")) {
    n = heads * width;
    array.shape = "(" + std::to_string(heads) + ", " + std::to_string(width) + ")";
  }
  const std::uint8_t odd = input.byte();
  if (odd > 240) {
    array.shape = input.text(input.below(40));
  }
  const std::size_t item = array.descr.size() == 3 && array.descr[2] >= '1' && array.descr[2] <= '8'
                               ? static_cast<std::size_t>(array.descr[2] - '0')
                               : 4;
  const std::string seed = input.text(input.below(16));
  array.data.assign(n * item, '\0');
  for (std::size_t i = 0; i < array.data.size() && !seed.empty(); ++i) {
    array.data[i] = seed[i % seed.size()];
  }
  if (numbers && seed.empty() && array.descr == "<i4") {
    for (std::size_t i = 0; i < n; ++i) {
      array.data[4 * i] = static_cast<char>(i);
    }
  }
  if (odd == 240) {
    array.data.resize(input.below(64));
  }
  return array;
}

std::string npy(const Array& array, fuzz::Input& input) {
  const std::string header = "{'descr': '" + array.descr +
                             "', 'fortran_order': " + (input.byte() > 250 ? "True" : "False") +
                             ", 'shape': " + array.shape + ", }\n";
  std::string out = "\x93NUMPY";
  out += '\1';
  put(out, 0, 1);
  put(out, input.byte() > 250 ? input.number(2) : header.size(), 2);
  return out + header + array.data;
}

std::string archive_from(fuzz::Input& input) {
  std::string out, directory;
  std::size_t n = 0;
  for (; !input.empty() && n < 16; ++n) {
    const Array array = array_from(input);
    const std::string content = npy(array, input), name = array.name + ".npy";
    const std::uint8_t how = input.byte();
    const bool deflate = how % 2 == 1;
    const std::string stored = deflate ? deflated(content) : content;
    std::uint64_t offset = out.size(), bytes = content.size(), stored_bytes = stored.size();
    uLong crc = ::crc32_z(::crc32(0, nullptr, 0), reinterpret_cast<const Bytef*>(content.data()), content.size());
    if (how > 250) {  // a directory that lies
      std::uint64_t* const fields[] = {&offset, &bytes, &stored_bytes, &crc};
      *input.pick(fields) = input.number(4);
    }
    const auto fields = [&](std::string& to) {
      put(to, 0, 2);
      put(to, deflate ? 8 : 0, 2);
      put(to, 0, 4);
      put(to, crc, 4);
      put(to, stored_bytes, 4);
      put(to, bytes, 4);
      put(to, name.size(), 2);
      put(to, 0, 2);
    };
    put(out, 0x04034b50U, 4);
    put(out, 20, 2);
    fields(out);
    out += name + stored;
    put(directory, 0x02014b50U, 4);
    put(directory, 20, 2);
    put(directory, 20, 2);
    fields(directory);
    put(directory, 0, 10);
    put(directory, offset, 4);
    directory += name;
  }
  const std::size_t begin = out.size();
  out += directory;
  put(out, 0x06054b50U, 4);
  put(out, 0, 4);
  put(out, n, 2);
  put(out, n, 2);
  put(out, directory.size(), 4);
  put(out, begin, 4);
  put(out, 0, 2);
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const std::uint8_t mode = input.byte();
  ImportOptions options;
  options.prompt_len = 1 + mode / 4 % 2;
  options.attention_scale = 0.5;
  options.rope_theta = mode / 8 % 4 == 1 ? 1e4 : 0;
  options.profile = mode / 32 % 2 == 1 ? Profile::archive : Profile::working;
  const std::filesystem::path in = fuzz::scratch() / "in.npz", out = fuzz::scratch() / "out.h5";
  fuzz::write_file(in, mode % 4 == 0 ? input.all_text() : archive_from(input));
  if (fuzz::answered<TraceError, std::invalid_argument>([&] { import_npz(in, out, options); })) {
    const TraceReader trace(out);
    info_text(trace);
    verify(trace);
  }
  return 0;
}
