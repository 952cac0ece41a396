// Files that claim, share or inflate far beyond their own size are refused by name, before anything is allocated.
#include "traces/limits.hpp"

#include <hdf5.h>
#include <zlib.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <functional>

#include "tests/traces/fixtures.hpp"
#include "traces/hdf5.hpp"
#include "traces/import.hpp"
#include "traces/inflate.hpp"
#include "traces/info.hpp"
#include "traces/npz.hpp"
#include "traces/verify.hpp"

namespace kvreplay::test {
namespace {

using Bytes = std::vector<char>;
constexpr std::size_t kMiB = std::size_t{1} << 20;

Bytes deflated(const Bytes& data, bool raw = false) {
  z_stream stream{};
  REQUIRE(::deflateInit2(&stream, 9, Z_DEFLATED, raw ? -MAX_WBITS : MAX_WBITS, 9, Z_DEFAULT_STRATEGY) == Z_OK);
  Bytes out(::deflateBound(&stream, data.size()));
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data.data()));
  stream.avail_in = static_cast<uInt>(data.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  REQUIRE(::deflate(&stream, Z_FINISH) == Z_STREAM_END);
  out.resize(stream.total_out);
  ::deflateEnd(&stream);
  return out;
}

// A small good trace, in which the library itself (no wrapper of ours would) then changes what a test is about.
class Altered {
 public:
  explicit Altered(Profile profile = Profile::working) {
    write_small(path(), {.shape = {}, .element = ElementType::f16, .profile = profile, .queries = {}, .extras = true});
    file_ = H5Fopen(path().c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    REQUIRE(file_ >= 0);
  }
  ~Altered() { close(); }
  Altered(const Altered&) = delete;
  Altered& operator=(const Altered&) = delete;

  hid_t file() const { return file_; }
  std::filesystem::path path() const { return folder_ / "t.h5"; }

  // Replaces a dataset by an empty one of this type and shape; chunk 0 = contiguous, deflate 0 = none. The caller
  // closes it.
  hid_t replace(const char* name, hid_t type, std::vector<hsize_t> shape, std::vector<hsize_t> chunk = {},
                unsigned deflate = 0) {
    REQUIRE(H5Ldelete(file_, name, H5P_DEFAULT) >= 0);
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    if (!chunk.empty()) {
      H5Pset_chunk(creation, static_cast<int>(chunk.size()), chunk.data());
    }
    if (deflate > 0) {
      H5Pset_deflate(creation, deflate);
    }
    const hid_t space = H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
    const hid_t dataset = H5Dcreate2(file_, name, type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
    REQUIRE(dataset >= 0);
    H5Sclose(space);
    H5Pclose(creation);
    return dataset;
  }

  std::string refusal() {
    close();
    return message_of<TraceError>([&] { TraceReader{path()}; });
  }
  // Where opening is not enough.
  std::string refusal_of_reading() {
    close();
    return message_of<TraceError>([&] { verify(TraceReader(path())); });
  }

 private:
  void close() {
    if (file_ >= 0) {
      H5Fclose(file_);
      file_ = -1;
    }
  }
  TemporaryFolder folder_;
  hid_t file_ = -1;
};

// One array of a zip archive, as it is claimed and as it is.
struct ZipEntry {
  std::string name;
  Bytes stored;
  std::uint32_t bytes = 0, crc = 0;
  std::uint16_t method = 0;
};

Bytes npy(const std::string& descr, const std::string& shape, const Bytes& data) {
  const std::string header = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }\n";
  std::string out = "\x93NUMPY";
  out += '\1';
  out += '\0';
  out += static_cast<char>(header.size() & 0xff);
  out += static_cast<char>(header.size() >> 8);
  out += header;
  out.append(data.begin(), data.end());
  return {out.begin(), out.end()};
}

std::uint32_t crc_of(const Bytes& data) {
  return static_cast<std::uint32_t>(
      ::crc32_z(::crc32(0, nullptr, 0), reinterpret_cast<const Bytef*>(data.data()), data.size()));
}

ZipEntry stored_entry(const std::string& name, const Bytes& data) {
  return {name, data, static_cast<std::uint32_t>(data.size()), crc_of(data), 0};
}

void put(Bytes& out, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) {
    out.push_back(static_cast<char>(i < 8 ? value >> (8 * i) : 0));
  }
}

// `at` overrides where the directory says an entry is.
Bytes zip_of(const std::vector<ZipEntry>& entries, const std::map<std::string, std::uint32_t>& at = {}) {
  Bytes out, directory;
  for (const ZipEntry& entry : entries) {
    const auto here = static_cast<std::uint32_t>(out.size());
    const auto fields = [&](Bytes& to) {
      put(to, 0, 2);  // flags
      put(to, entry.method, 2);
      put(to, 0, 4);  // time
      put(to, entry.crc, 4);
      put(to, entry.stored.size(), 4);
      put(to, entry.bytes, 4);
      put(to, entry.name.size(), 2);
      put(to, 0, 2);  // extra
    };
    put(out, 0x04034b50U, 4);
    put(out, 20, 2);
    fields(out);
    out.insert(out.end(), entry.name.begin(), entry.name.end());
    out.insert(out.end(), entry.stored.begin(), entry.stored.end());
    put(directory, 0x02014b50U, 4);
    put(directory, 20, 2);
    put(directory, 20, 2);
    fields(directory);
    put(directory, 0, 10);  // comment, disk, attributes
    put(directory, at.contains(entry.name) ? at.at(entry.name) : here, 4);
    directory.insert(directory.end(), entry.name.begin(), entry.name.end());
  }
  const std::size_t begin = out.size();
  out.insert(out.end(), directory.begin(), directory.end());
  put(out, 0x06054b50U, 4);
  put(out, 0, 4);
  put(out, entries.size(), 2);
  put(out, entries.size(), 2);
  put(out, directory.size(), 4);
  put(out, begin, 4);
  put(out, 0, 2);
  return out;
}

std::string refusal_of_npz(const Bytes& bytes) {
  const TemporaryFolder folder;
  write_bytes(folder / "in.npz", bytes);
  return message_of<TraceError>([&] {
    import_npz(folder / "in.npz", folder / "out.h5", [] {
      ImportOptions options;
      options.prompt_len = 1;
      options.attention_scale = 1;
      return options;
    }());
  });
}

}  // namespace

TEST_CASE("an allowance grows with the file and does not overflow") {
  CHECK(limits::kColumn.of(0) == 16 * kMiB);
  CHECK(limits::kColumn.of(1000) == 16 * kMiB + 16000);
  CHECK(limits::kArrays.of(~std::uint64_t{0}) == ~std::uint64_t{0});
}

TEST_CASE("what inflates to more or less than it should is noticed at once") {
  const Bytes zeros(16 * kMiB, 0), packed = deflated(zeros);
  std::vector<std::byte> out(1000);
  CHECK_FALSE(inflate_exactly(std::as_bytes(std::span(packed)), out, Deflated::zlib));
  out.resize(16 * kMiB);
  CHECK(inflate_exactly(std::as_bytes(std::span(packed)), out, Deflated::zlib));
  CHECK_FALSE(inflate_exactly(std::as_bytes(std::span(packed)), out, Deflated::raw));
  out.resize(16 * kMiB + 1);
  CHECK_FALSE(inflate_exactly(std::as_bytes(std::span(packed)), out, Deflated::zlib));
  CHECK_FALSE(inflate_exactly({}, out, Deflated::zlib));
}

TEST_CASE("a column whose values were never written, or are out of proportion to the file, is refused") {
  for (const hsize_t n : {hsize_t{100000}, hsize_t{1} << 30, (hsize_t{1} << 31) - 2}) {
    Altered trace;
    H5Dclose(trace.replace("tokens/id", H5T_STD_I32LE, {n}));
    CHECK_THAT(trace.refusal(), Catch::Contains("/tokens/id claims") && Catch::Contains("but stores 0 bytes"));
  }
  // One chunk is there, and so the dataset stores something.
  Altered trace;
  const hid_t ids = trace.replace("tokens/id", H5T_STD_I8LE, {hsize_t{3} << 20}, {hsize_t{1} << 20}, 0);
  const hsize_t origin = 0;
  const Bytes chunk(kMiB, 0);
  H5Dwrite_chunk(ids, H5P_DEFAULT, 0, &origin, chunk.size(), chunk.data());
  H5Dclose(ids);
  CHECK(trace.refusal() != "");
  Altered more;
  const hid_t many = more.replace("tokens/id", H5T_STD_I8LE, {hsize_t{1} << 29}, {hsize_t{1} << 20}, 0);
  H5Dwrite_chunk(many, H5P_DEFAULT, 0, &origin, chunk.size(), chunk.data());
  H5Dclose(many);
  CHECK_THAT(more.refusal(), Catch::Contains("/tokens/id holds 536870912 values of 8 bytes; in a file of") &&
                                 Catch::Contains("bytes are allowed"));
}

TEST_CASE("a column's chunk that inflates beyond its size is refused before the library follows it") {
  Altered trace;
  const hid_t ids = trace.replace("tokens/id", H5T_STD_I32LE, {40}, {40}, 6);
  const Bytes bomb = deflated(Bytes(64 * kMiB, 0));
  const hsize_t origin = 0;
  REQUIRE(H5Dwrite_chunk(ids, H5P_DEFAULT, 0, &origin, bomb.size(), bomb.data()) >= 0);
  H5Dclose(ids);
  CHECK_THAT(trace.refusal(), Catch::Contains("/tokens/id: a chunk does not inflate to its 160 bytes"));
}

TEST_CASE("a column's chunk of absurd size is refused") {
  Altered trace;
  const hid_t type = H5Tcopy(H5T_STD_I32LE);
  // A dataset that could grow may have chunks larger than it is.
  REQUIRE(H5Ldelete(trace.file(), "tokens/id", H5P_DEFAULT) >= 0);
  const hsize_t n = 40, most = H5S_UNLIMITED, chunk = hsize_t{1} << 29;
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE), space = H5Screate_simple(1, &n, &most);
  H5Pset_chunk(creation, 1, &chunk);
  H5Pset_deflate(creation, 9);
  const hid_t ids = H5Dcreate2(trace.file(), "tokens/id", type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  REQUIRE(ids >= 0);
  const hsize_t origin = 0;
  const Bytes little = deflated(Bytes(1000, 0));
  H5Dwrite_chunk(ids, H5P_DEFAULT, 0, &origin, little.size(), little.data());
  H5Dclose(ids);
  H5Sclose(space);
  H5Pclose(creation);
  H5Tclose(type);
  CHECK_THAT(trace.refusal(), Catch::Contains("/tokens/id has a chunk that holds 536870912 values of 4 bytes"));
}

TEST_CASE("texts that share their bytes, or one that is long, are counted as they would be stored") {
  const auto with_pieces = [](hsize_t n_tokens, const std::vector<std::size_t>& lengths) {
    const TemporaryFolder folder;
    write_small(folder / "t.h5", {.shape = {.n_tokens = static_cast<Pos>(n_tokens)}, .extras = true});
    const hid_t file = H5Fopen((folder / "t.h5").c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    REQUIRE(H5Ldelete(file, "tokens/piece", H5P_DEFAULT) >= 0);
    const hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, H5T_VARIABLE);
    const hid_t space = H5Screate_simple(1, &n_tokens, nullptr);
    const hid_t pieces = H5Dcreate2(file, "tokens/piece", type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    std::vector<std::string> texts;
    std::vector<const char*> raw;
    for (std::size_t i = 0; i < n_tokens; ++i) {
      texts.emplace_back(i < lengths.size() ? lengths[i] : 1, 'x');
    }
    for (const std::string& text : texts) {
      raw.push_back(text.c_str());
    }
    REQUIRE(H5Dwrite(pieces, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, raw.data()) >= 0);
    const haddr_t offset = H5Dget_offset(pieces);
    H5Dclose(pieces);
    H5Sclose(space);
    H5Tclose(type);
    H5Fclose(file);
    return std::pair(file_bytes(folder / "t.h5"), offset);
  };
  const auto refusal = [](const Bytes& bytes) {
    const TemporaryFolder folder;
    write_bytes(folder / "t.h5", bytes);
    return message_of<TraceError>([&] { TraceReader(folder / "t.h5"); });
  };
  CHECK(refusal(with_pieces(40, {100, 5, 60000}).first) == "");
  CHECK_THAT(refusal(with_pieces(2000, {60000}).first), Catch::Contains("/tokens/piece holds 2000 values of 60001"));

  // All 2000 elements refer to the first one's bytes.
  auto [bytes, offset] = with_pieces(2000, {60000});
  for (std::size_t i = 1; i < 2000; ++i) {
    std::memcpy(bytes.data() + offset + 16 * i, bytes.data() + offset, 16);
  }
  CHECK_THAT(refusal(bytes), Catch::Contains("/tokens/piece holds texts of more than"));
}

TEST_CASE("columns outside of the file, or in a way that the library alone could read, are refused") {
  const TemporaryFolder folder;
  // HDF5's oldest layout has no checksums, so that an address can be changed.
  const auto path = folder / "t.h5";
  write_small(path);
  const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
  const hid_t ids = H5Dopen2(file, "tokens/id", H5P_DEFAULT);
  const hid_t creation = H5Dget_create_plist(ids);
  CHECK(H5Pget_layout(creation) == H5D_CONTIGUOUS);
  H5Pclose(creation);
  H5Dclose(ids);
  H5Fclose(file);

  Altered fletcher;
  REQUIRE(H5Ldelete(fletcher.file(), "tokens/position", H5P_DEFAULT) >= 0);
  const hsize_t n = 40;
  const hid_t plan = H5Pcreate(H5P_DATASET_CREATE), space = H5Screate_simple(1, &n, nullptr);
  H5Pset_chunk(plan, 1, &n);
  H5Pset_fletcher32(plan);
  const hid_t positions =
      H5Dcreate2(fletcher.file(), "tokens/position", H5T_STD_I32LE, space, H5P_DEFAULT, plan, H5P_DEFAULT);
  const std::vector<std::int32_t> zeros(40, 0);
  REQUIRE(H5Dwrite(positions, H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros.data()) >= 0);
  H5Dclose(positions);
  H5Sclose(space);
  H5Pclose(plan);
  CHECK_THAT(fletcher.refusal(), Catch::Contains("/tokens/position uses filter 3"));
}

TEST_CASE("arrays that stand for far more than the file holds are refused at open") {
  SECTION("chunks that inflate a thousandfold") {
    Altered trace;  // 2 heads of 40 tokens become 2 heads of 5 million
    const hsize_t n = 5'000'000;
    for (const char* name : {"tokens/id", "tokens/position", "tokens/phase"}) {
      const hid_t column = trace.replace(name, H5T_STD_U8LE, {n}, {n}, 9);
      const std::vector<std::uint8_t> zeros(n, 0);
      REQUIRE(H5Dwrite(column, H5T_NATIVE_UINT8, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros.data()) >= 0);
      H5Dclose(column);
    }
    CHECK_THAT(trace.refusal(), Catch::Contains("/tokens/id holds 5000000 values of 8 bytes"));
  }
  SECTION("arrays of one layer") {
    const TemporaryFolder folder;
    Shape shape;
    shape.head_dim = 512;
    shape.v_head_dim = 512;
    shape.n_tokens = 8000;
    TraceInfo meta = small_meta(shape);
    meta.rope = {};
    WriterOptions options;
    options.profile = Profile::archive;
    options.archive.chunk_tokens = 8192;
    options.queries = queries_all(shape.n_tokens);
    TraceWriter writer(folder / "t.h5", meta, shape.n_tokens, options);
    const std::size_t n = static_cast<std::size_t>(shape.n_tokens) * 512;
    writer.append_tokens(std::vector<std::int32_t>(static_cast<std::size_t>(shape.n_tokens), 7), {});
    for (const int layer : meta.layers) {
      writer.append(layer, shape.n_tokens, std::vector<float>(2 * n), std::vector<float>(2 * n),
                    std::vector<float>(4 * n));
    }
    CHECK_THROWS_WITH(writer.close(), Catch::Contains("its arrays stand for more than"));
  }
}

TEST_CASE("an array of more chunks than a search can serve is refused") {
  Altered trace;
  const hid_t k = trace.replace("layers/001/k", H5T_STD_I16LE, {2, 40, 8}, {1, 1, 1});
  H5Dclose(k);
  CHECK_THAT(trace.refusal(), Catch::Contains("/layers/001/k"));

  const TemporaryFolder folder;
  hdf5::File file = hdf5::File::create(folder / "a.h5");
  const auto made = file.root().create("k", hdf5::Type::f16, {4, 40000, 8}, {.chunk = {1, 1, 8}});
  CHECK_THROWS_WITH(made.storage(), Catch::Contains("/k has 160000 chunks; at most 16384 are allowed"));
  const auto large = file.root().create("v", hdf5::Type::f16, {4, 1 << 20, 1 << 10}, {.chunk = {4, 1 << 15, 1 << 10}});
  CHECK_NOTHROW(large.storage());
  file.discard();
}

TEST_CASE("JSON in an attribute that is nested without end is shown as text") {
  const TemporaryFolder folder;
  TraceInfo meta = small_meta();
  meta.config_json = std::string(20000, '[') + std::string(20000, ']');
  WriterOptions options;
  options.queries = queries_all(40);
  TraceWriter writer(folder / "t.h5", meta, 40, options);
  append_small(writer, meta, options.queries, 0, 40);
  writer.close();
  const TraceReader trace(folder / "t.h5");
  CHECK_THAT(info_json(trace), Catch::Contains("\"config\": \"[[[["));
}

TEST_CASE("zip bombs, shared bytes and absurd shapes in an npz are refused") {
  const Bytes ids = npy("<i4", "(2,)", Bytes(8, 0));
  CHECK_THAT(refusal_of_npz(zip_of({stored_entry("token_ids.npy", ids)})), Catch::Contains("has no layers"));

  // 400 MiB of zeros in 400 KB, as honest as a bomb can be.
  const Bytes part(8 * kMiB, 0), packed = deflated(part, true);
  std::vector<ZipEntry> bomb;
  for (int i = 0; i < 50; ++i) {
    bomb.push_back({"k" + std::to_string(i) + ".npy", packed, 8 * kMiB, crc_of(part), 8});
  }
  CHECK_THAT(refusal_of_npz(zip_of(bomb)), Catch::Contains("in.npz: its arrays stand for more than"));

  // One that says it is small.
  CHECK_THAT(refusal_of_npz(zip_of({{"token_ids.npy", packed, 100, 0, 8}, stored_entry("k0.npy", ids)})),
             Catch::Contains("does not inflate to its 100 bytes"));

  // Two entries of the same bytes.
  CHECK_THAT(refusal_of_npz(zip_of({stored_entry("k0.npy", ids), stored_entry("v0.npy", ids)}, {{"v0.npy", 0}})),
             Catch::Contains("overlap at byte 0"));
  CHECK_THAT(refusal_of_npz(zip_of({stored_entry("k0.npy", ids)}, {{"k0.npy", 1U << 30}})),
             Catch::Contains("at byte 1073741824 of a file of"));

  for (const char* shape : {"(4611686018427387904, 4)", "(99999999999999999999,)", "(1, 1, 1, 1, 1, 1, 1, 1, 1)"}) {
    CHECK_THAT(refusal_of_npz(zip_of(
                   {stored_entry("token_ids.npy", npy("<i4", shape, Bytes(8, 0))), stored_entry("k0.npy", ids)})),
               Catch::Contains("in.npz: token_ids: ") && Catch::Contains("shape"));
  }
  CHECK_THAT(refusal_of_npz(zip_of({stored_entry("token_ids.npy", ids), stored_entry("k2147483647.npy", ids)})),
             Catch::Contains("layer number 2147483647; at most 4095 are allowed"));
}

}  // namespace kvreplay::test
