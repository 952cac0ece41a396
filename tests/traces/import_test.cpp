#include "traces/import.hpp"

#include <zlib.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <random>

#include "tests/traces/fixtures.hpp"
#include "traces/npz.hpp"
#include "traces/verify.hpp"

namespace kvreplay::test {
namespace {

using Bytes = std::string;

template <typename T>
Bytes little(T value) {
  return Bytes(reinterpret_cast<const char*>(&value), sizeof(value));
}

Bytes npy(const std::string& descr, const std::string& shape, const Bytes& data) {
  Bytes header = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }";
  header.resize((10 + header.size() + 64) / 64 * 64 - 10, ' ');
  header.back() = '\n';
  return Bytes("\x93NUMPY\x01\x00", 8) + little(static_cast<std::uint16_t>(header.size())) + header + data;
}

template <typename T>
Bytes npy_of(const std::string& descr, const std::string& shape, const std::vector<T>& values) {
  return npy(descr, shape, Bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)));
}

Bytes deflated(const Bytes& data) {
  z_stream stream{};
  REQUIRE(deflateInit2(&stream, 6, Z_DEFLATED, -MAX_WBITS, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  Bytes out(data.size() + 1000, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data.data()));
  stream.avail_in = static_cast<uInt>(data.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  REQUIRE(deflate(&stream, Z_FINISH) == Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

// What np.savez and np.savez_compressed write.
Bytes zip(const std::map<std::string, Bytes>& arrays, bool compress) {
  Bytes out, directory;
  for (const auto& [name, data] : arrays) {
    const Bytes stored = compress ? deflated(data) : data, file = name + ".npy";
    const auto crc = static_cast<std::uint32_t>(
        crc32(0, reinterpret_cast<const Bytef*>(data.data()), static_cast<uInt>(data.size())));
    const std::uint16_t method = compress ? 8 : 0;
    const Bytes common = little(std::uint16_t{20}) + little(std::uint16_t{0}) + little(method) +
                         little(std::uint32_t{0}) + little(crc) + little(static_cast<std::uint32_t>(stored.size())) +
                         little(static_cast<std::uint32_t>(data.size())) +
                         little(static_cast<std::uint16_t>(file.size())) + little(std::uint16_t{0});
    directory += "PK\x01\x02" + little(std::uint16_t{20}) + common + little(std::uint16_t{0}) +
                 little(std::uint32_t{0}) + little(std::uint32_t{0}) + little(static_cast<std::uint32_t>(out.size())) +
                 file;
    directory.resize(directory.size());
    out += "PK\x03\x04" + common + file + stored;
  }
  const auto n = static_cast<std::uint16_t>(arrays.size());
  return out + directory + "PK\x05\x06" + little(std::uint32_t{0}) + little(n) + little(n) +
         little(static_cast<std::uint32_t>(directory.size())) + little(static_cast<std::uint32_t>(out.size())) +
         little(std::uint16_t{0});
}

constexpr Pos kTokens = 20;

std::vector<Pos> first(Pos n) { return queries_all(n); }

std::map<std::string, Bytes> good_arrays() {
  std::map<std::string, Bytes> arrays;
  std::vector<std::int64_t> ids;
  for (Pos pos = 0; pos < kTokens; ++pos) {
    ids.push_back(pos + 5);
  }
  arrays["token_ids"] = npy_of("<i8", "(20,)", ids);
  for (const int layer : {0, 11}) {
    const std::string l = std::to_string(layer);
    arrays["q" + l] = npy_of("<f4", "(4, 20, 8)", rows(layer, 'q', 4, first(kTokens), 8));
    arrays["k" + l] = npy_of("<f4", "(2, 20, 8)", rows(layer, 'k', 2, first(kTokens), 8));
    arrays["v" + l] = npy_of("<f4", "(2, 20, 6)", rows(layer, 'v', 2, first(kTokens), 6));
  }
  return arrays;
}

ImportOptions good_options() {
  ImportOptions options;
  options.prompt_len = 4;
  options.attention_scale = 0.25;
  options.rope_theta = 1e4;
  options.model_name = "m";
  return options;
}

std::string import_refusal(const Bytes& file, const ImportOptions& options = good_options()) {
  const TemporaryFolder folder;
  write_bytes(folder / "in.npz", {file.begin(), file.end()});
  const auto work = [&] { import_npz(folder / "in.npz", folder / "out.h5", options); };
  std::string message;
  try {
    work();
  } catch (const TraceError& error) {
    message = error.what();
  } catch (const std::invalid_argument& error) {
    message = std::string("usage: ") + error.what();
  }
  CHECK(std::filesystem::exists(folder / "out.h5") == message.empty());
  CHECK_FALSE(std::filesystem::exists(folder / "out.h5.part"));
  return message;
}

std::string refusal_with(const std::string& name, const Bytes& array) {
  std::map<std::string, Bytes> arrays = good_arrays();
  arrays[name] = array;
  return import_refusal(zip(arrays, false));
}

}  // namespace

TEST_CASE("an npz becomes a trace, stored or deflated, whole or cut") {
  const TemporaryFolder folder;
  for (const bool compress : {false, true}) {
    for (const ElementType element : {ElementType::f16, ElementType::bf16, ElementType::f32}) {
      const Bytes file = zip(good_arrays(), compress);
      write_bytes(folder / "in.npz", {file.begin(), file.end()});
      ImportOptions options = good_options();
      options.dtype = element;
      options.n_tokens = compress ? 15 : 0;
      options.n_layers = 12;
      options.qk_norm = true;
      options.layers = compress ? std::vector<int>{11} : std::vector<int>{};
      options.profile = compress ? Profile::archive : Profile::working;
      options.provenance = "made up";
      import_npz(folder / "in.npz", folder / "out.h5", options);
      const TraceReader trace(folder / "out.h5");
      const TraceInfo& info = trace.info();
      CHECK(info.n_tokens == (compress ? 15 : 20));
      CHECK(info.layers == (compress ? std::vector<int>{11} : std::vector<int>{0, 11}));
      CHECK(info.n_layers == 12);
      CHECK(info.n_heads == 4);
      CHECK(info.v_head_dim == 6);
      CHECK(info.element == element);
      CHECK(info.qk_norm);
      CHECK(info.provenance == "made up");
      CHECK(info.rope.inv_freq.size() == 4);
      CHECK(info.rope.inv_freq[2] == Approx(0.01));
      CHECK(info.token_ids[3] == 8);
      std::vector<float> q(15 * 8);
      trace.read_q(11, 3, 0, 15, q);
      CHECK(q[14 * 8 + 5] == value_at(11, 'q', 3, 14, 5));
      CHECK(q[0] == value_at(11, 'q', 3, 0, 0));
      std::filesystem::remove(folder / "out.h5");
    }
  }
}

TEST_CASE("optional arrays: positions, chosen queries, outputs, w_o, float64 and bfloat16") {
  std::map<std::string, Bytes> arrays = good_arrays();
  const std::vector<Pos> queries = {2, 5, 17};
  std::vector<std::int32_t> position;
  for (Pos pos = 0; pos < kTokens; ++pos) {
    position.push_back(pos + 100);
  }
  arrays["position"] = npy_of("<i4", "(20,)", position);
  arrays["q_index"] = npy_of("<i4", "(3,)", queries);
  arrays["out_index"] = npy_of("<i4", "(1,)", std::vector<std::int32_t>{5});
  for (const std::string l : {"0", "11"}) {
    const int layer = std::stoi(l);
    std::vector<double> q;
    for (const float x : rows(layer, 'q', 4, queries, 8)) {
      q.push_back(static_cast<double>(x));
    }
    arrays["q" + l] = npy_of("<f8", "(4, 3, 8)", q);
    arrays["out" + l] = npy_of("<f4", "(4, 1, 6)", std::vector<float>(24, 1.0F));
    arrays["w_o" + l] = npy_of("<f4", "(7, 24)", std::vector<float>(168, 2.0F));
    const std::vector<float> k = rows(layer, 'k', 2, first(kTokens), 8);
    std::vector<std::uint16_t> bits(k.size());
    narrow(ElementType::bf16, k, reinterpret_cast<std::byte*>(bits.data()));
    arrays["k" + l] = npy_of(l == "0" ? "<u2" : "|V2", "(2, 20, 8)", bits);
  }
  const TemporaryFolder folder;
  const Bytes file = zip(arrays, true);
  write_bytes(folder / "in.npz", {file.begin(), file.end()});
  import_npz(folder / "in.npz", folder / "out.h5", good_options());
  const TraceReader trace(folder / "out.h5");
  CHECK(trace.info().element == ElementType::bf16);
  CHECK(trace.info().positions[3] == 103);
  CHECK(std::vector<Pos>(trace.q_index(0).begin(), trace.q_index(0).end()) == queries);
  CHECK(trace.hidden(0) == 7);
  std::vector<float> q(8), out(6), k(8);
  trace.read_q(11, 2, 17, 18, q);
  CHECK(q[6] == value_at(11, 'q', 2, 17, 6));
  trace.read_out(0, 3, 5, 6, out);
  CHECK(out == std::vector<float>(6, 1.0F));
  trace.read_k(0, 1, 9, 10, k);
  CHECK(k[7] == value_at(0, 'k', 1, 9, 7));
}

TEST_CASE("hostile and mistaken npz files are one sentence") {
  const std::vector<float> k = rows(0, 'k', 2, first(kTokens), 8);
  CHECK(import_refusal(zip(good_arrays(), false)) == "");
  CHECK_THAT(import_refusal("not a zip"), Catch::Contains("expected an .npz file"));
  CHECK_THAT(import_refusal(""), Catch::Contains("expected an .npz file"));
  CHECK_THAT(refusal_with("k0", "garbage"), Catch::Contains("is not an .npy array"));
  CHECK_THAT(refusal_with("k0", npy_of("<f4", "(2, 20, 9)", k)), Catch::Contains("needs 1440 bytes, found 1280"));
  CHECK_THAT(refusal_with("k0", npy_of("<f4", "(2, 18446744073709551615, 8)", k)), Catch::Contains("absurd"));
  CHECK_THAT(refusal_with("k11", npy_of("<f4", "(20, 2, 8)", k)), Catch::Contains("expected shape (2, 20, 8)"));
  CHECK_THAT(refusal_with("k0", npy_of("<f4", "(320,)", k)), Catch::Contains("expected three dimensions"));
  CHECK_THAT(refusal_with("k0", npy_of(">f4", "(2, 20, 8)", k)), Catch::Contains("'>f4'"));
  CHECK_THAT(refusal_with("k0", npy_of("|O8", "(2, 20, 4)", k)), Catch::Contains("little-endian floats or integers"));
  CHECK_THAT(refusal_with("k0", npy_of("<i4", "(2, 20, 8)", k)), Catch::Contains("NumPy type i4"));
  CHECK_THAT(refusal_with("k11", npy_of("<f4", "(2, 20, 4)", std::vector<float>(160))),
             Catch::Contains("expected shape (2, 20, 8)"));
  CHECK_THAT(refusal_with("token_ids", npy_of("<f4", "(20,)", std::vector<float>(20))),
             Catch::Contains("integers are expected"));
  CHECK_THAT(refusal_with("q0", npy_of("<f4", "(4, 3, 8)", std::vector<float>(96))),
             Catch::Contains("add an array q_index"));
  CHECK_THAT(refusal_with("q0", npy_of("<f4", "(3, 20, 8)", std::vector<float>(480))),
             Catch::Contains("not a multiple of the 2 KV heads"));
  CHECK_THAT(refusal_with("keys0", npy_of("<f4", "(2, 20, 8)", k)), Catch::Contains("the array 'keys0' is unknown"));
  CHECK_THAT(refusal_with("k5", npy_of("<f4", "(2, 20, 8)", k)), Catch::Contains("is missing"));
  std::vector<float> bad = k;
  bad[(1 * 20 + 3) * 8 + 4] = NAN;
  CHECK_THAT(refusal_with("k0", npy_of("<f4", "(2, 20, 8)", bad)),
             Catch::Contains("k0: expected finite values, found nan at [1, 3, 4]"));
  bad[(1 * 20 + 3) * 8 + 4] = 1e9F;
  std::map<std::string, Bytes> large = good_arrays();
  large["k0"] = npy_of("<f4", "(2, 20, 8)", bad);
  ImportOptions half = good_options();
  half.dtype = ElementType::f16;
  CHECK_THAT(import_refusal(zip(large, false), half), Catch::Contains("does not fit f16"));

  const auto with = [&](auto change) {
    ImportOptions options = good_options();
    change(options);
    return import_refusal(zip(good_arrays(), false), options);
  };
  CHECK_THAT(with([](ImportOptions& o) { o.prompt_len = 21; }), Catch::Contains("usage: prompt_len 21"));
  CHECK_THAT(with([](ImportOptions& o) { o.prompt_len = 0; }), Catch::Contains("usage: prompt_len 0"));
  CHECK_THAT(with([](ImportOptions& o) { o.n_tokens = 21; }), Catch::Contains("usage: tokens 21"));
  CHECK_THAT(with([](ImportOptions& o) { o.layers = {3}; }), Catch::Contains("usage: layer 3 is not in"));
  CHECK_THAT(with([](ImportOptions& o) { o.n_layers = 5; }),
             Catch::Contains("usage: layers must be ascending and below n_layers = 5"));
  CHECK_THAT(with([](ImportOptions& o) { o.rope_style = "x"; }), Catch::Contains("usage: rope style 'x'"));
  CHECK_THAT(with([](ImportOptions& o) { o.attention_scale = 0; }), Catch::Contains("usage: attention_scale 0"));
}

TEST_CASE("an npz with flipped bits or a missing end is refused or read as it was") {
  const TemporaryFolder folder;
  std::mt19937_64 random(3);
  for (const bool compress : {false, true}) {
    const Bytes good = zip(good_arrays(), compress);
    const auto hash = [&](const Bytes& file) -> std::string {
      write_bytes(folder / "in.npz", {file.begin(), file.end()});
      try {
        const Npz npz(folder / "in.npz");
        std::string all;
        for (const std::string& name : npz.names()) {
          const NpyArray array = npz.load(name);
          all += name + std::to_string(array.shape.size()) +
                 std::to_string(
                     crc32(0, reinterpret_cast<const Bytef*>(array.data.data()), static_cast<uInt>(array.data.size())));
        }
        return all;
      } catch (const TraceError&) {
        return "";
      }
    };
    const std::string right = hash(good);
    REQUIRE(right != "");
    for (int i = 0; i < 300; ++i) {
      Bytes flipped = good;
      const std::size_t at = i % 2 == 0 ? random() % good.size() : good.size() - 1 - random() % 700;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << random() % 8));
      const std::string found = hash(flipped);
      // A name in the directory is not protected by any checksum; everything else is.
      INFO("byte " << at);
      CHECK((found.empty() || found.size() == right.size()));
      const Bytes cut = good.substr(0, random() % good.size());
      CHECK(hash(cut) == "");
    }
  }
}

}  // namespace kvreplay::test
