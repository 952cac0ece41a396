// Files that are wrong, by accident or on purpose: one sentence, or the same content; never a
// crash.
#include <catch2/catch.hpp>
#include <functional>
#include <random>

#include "tests/traces/fixtures.hpp"
#include "traces/hash.hpp"
#include "traces/hdf5.hpp"
#include "traces/stored_array.hpp"
#include "traces/verify.hpp"

namespace kvreplay::test {
namespace {

using hdf5::File;
using hdf5::Group;
using hdf5::Type;

// A minimal trace, written item by item so that each can be left out or replaced.
struct RawTrace {
  std::string without;                        // "model@n_heads", "tokens/id", "layers/000/q", ...
  std::map<std::string, hdf5::Shape> shapes;  // by dataset, instead of the right ones
  std::map<std::string, Type> types;
  std::function<void(const Group&)> then;  // changes to the finished file
  std::vector<float> k = std::vector<float>(2 * 12 * 4, 0.5F);
  std::vector<std::uint8_t> phase = {0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1};
  std::uint64_t n_valid = 12;

  void dataset(const Group& group, const std::string& path, const char* name, Type type, hdf5::Shape shape,
               std::span<const std::byte> data) const {
    if (without == path) {
      return;
    }
    const bool as_planned = !shapes.contains(path) && !types.contains(path);
    if (shapes.contains(path)) {
      shape = shapes.at(path);
    }
    if (types.contains(path)) {
      type = types.at(path);
    }
    const hdf5::Dataset made = group.create(name, type, shape);
    const std::vector<std::byte> zeros(hdf5::n_elements(shape) * hdf5::size_of(type));
    if (!zeros.empty()) {
      made.write(as_planned ? data : std::span<const std::byte>(zeros));
    }
  }

  void write(const std::filesystem::path& path) const {
    File file = File::create(path);
    const Group& root = file.root();
    const auto attribute = [&](const Group& group, const std::string& item, auto value) {
      if (without != item) {
        group.set(item.substr(item.find('@') + 1), value);
      }
    };
    attribute(root, "@format", "kvtrace");
    attribute(root, "@format_version", "1.0");
    const Group model = root.create_group("model");
    attribute(model, "model@name", "raw");
    attribute(model, "model@n_layers", 2);
    attribute(model, "model@n_heads", 4);
    attribute(model, "model@n_kv_heads", 2);
    attribute(model, "model@head_dim", 4);
    attribute(model, "model@v_head_dim", 4);
    attribute(model, "model@attention_scale", 0.5);
    attribute(model, "model@logit_softcap", 0.0);
    const std::vector<std::int32_t> windows = {0, 0}, numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    attribute(model, "model@sliding_window", std::span<const std::int32_t>(windows));
    if (without != "tokens") {
      const Group tokens = root.create_group("tokens");
      dataset(tokens, "tokens/id", "id", Type::i32, {12}, hdf5::bytes_of(numbers));
      dataset(tokens, "tokens/position", "position", Type::i32, {12}, hdf5::bytes_of(numbers));
      dataset(tokens, "tokens/phase", "phase", Type::u8, {12}, hdf5::bytes_of(phase));
    }
    dataset(root, "n_valid", "n_valid", Type::u64, {}, std::as_bytes(std::span(&n_valid, 1)));
    const Group layers = root.create_group("layers");
    if (without != "layers/000") {
      const Group layer = layers.create_group("000");
      const std::vector<float> q(4 * 12 * 4, 0.25F);
      dataset(layer, "layers/000/k", "k", Type::f32, {2, 12, 4}, hdf5::bytes_of(k));
      dataset(layer, "layers/000/v", "v", Type::f32, {2, 12, 4}, hdf5::bytes_of(k));
      dataset(layer, "layers/000/q", "q", Type::f32, {4, 12, 4}, hdf5::bytes_of(q));
    }
    if (then) {
      then(root);
    }
    file.publish();
  }
};

std::string refusal(const RawTrace& raw) {
  const TemporaryFolder folder;
  raw.write(folder / "t.h5");
  return message_of<TraceError>([&] { TraceReader(folder / "t.h5"); });
}

std::string refusal(std::function<void(const Group&)> then) {
  RawTrace raw;
  raw.then = std::move(then);
  return refusal(raw);
}

// Opens, checks everything, and says what the content is; "" if that was refused.
std::string content_or_refusal(const std::filesystem::path& path) {
  try {
    const TraceReader trace(path);
    const VerifyReport report = verify(trace);
    return report.failures.empty() ? report.hash + trace.info().model_name + trace.info().uuid : "";
  } catch (const TraceError&) {
    return "";
  }
}

}  // namespace

TEST_CASE("the minimal trace is a trace, also without q") {
  CHECK(refusal(RawTrace{}) == "");
  RawTrace raw;
  raw.without = "layers/000/q";
  CHECK(refusal(raw) == "");
}

TEST_CASE("whatever is missing is named") {
  for (const char* item :
       {"@format", "@format_version", "model@name", "model@n_layers", "model@n_heads", "model@n_kv_heads",
        "model@head_dim", "model@v_head_dim", "model@attention_scale", "model@logit_softcap", "model@sliding_window",
        "tokens", "tokens/id", "tokens/position", "tokens/phase", "n_valid", "layers/000/k", "layers/000/v"}) {
    RawTrace raw;
    raw.without = item;
    const std::string text = item, name = text.substr(text.find_last_of("@/") + 1);
    INFO(item);
    CHECK_THAT(refusal(raw), Catch::Contains(name));
    CHECK_THAT(refusal(raw),
               Catch::Contains(text.find('@') != std::string::npos ? "lacks the attribute" : "is missing"));
  }
  RawTrace raw;
  raw.without = "layers/000";
  CHECK_THAT(refusal(raw), Catch::Contains("at least one layer"));
}

TEST_CASE("wrong attributes are refused with what was expected and found") {
  const auto on_model = [](auto name, auto value) {
    return refusal([=](const Group& root) { root.group("model").set(name, value); });
  };
  CHECK_THAT(on_model("n_heads", "four"), Catch::Contains("@n_heads must be of an integer type"));
  CHECK_THAT(on_model("n_heads", 5), Catch::Contains("expected a divisor of n_heads = 5, found 2"));
  CHECK_THAT(on_model("n_heads", 0), Catch::Contains("found 0"));
  CHECK_THAT(on_model("n_layers", std::int64_t{1} << 40), Catch::Contains("found 1099511627776"));
  CHECK_THAT(on_model("head_dim", -8), Catch::Contains("found -8"));
  CHECK_THAT(on_model("attention_scale", 0.0), Catch::Contains("expected a positive number, found 0"));
  CHECK_THAT(on_model("attention_scale", double{NAN}), Catch::Contains("expected a finite number, found nan"));
  CHECK_THAT(on_model("logit_softcap", -1.0), Catch::Contains("found -1"));
  CHECK_THAT(on_model("n_layers", 3), Catch::Contains("expected 3 values, one per model layer, found 2"));
  CHECK_THAT(on_model("attn_scale", 1.0),
             Catch::Contains("the attribute 'attn_scale', which format 1.0 does not know"));
  CHECK(on_model("x_mine", 1.0) == "");
  CHECK_THAT(refusal([](const Group& root) { root.set("format_version", "2.0"); }), Catch::Contains("found '2.0'"));
  CHECK_THAT(refusal([](const Group& root) { root.set("format_version", "new"); }), Catch::Contains("found 'new'"));
  CHECK_THAT(refusal([](const Group& root) { root.set("format", "other"); }), Catch::Contains("found 'other'"));
  // A later minor version may hold more.
  CHECK(refusal([](const Group& root) {
          root.set("format_version", "1.7");
          root.set("later", 1);
        }) == "");
  const auto with_rope = [](const char* style, int rotary_dim, std::vector<double> inv_freq) {
    return refusal([=](const Group& root) {
      const Group rope = root.group("model").create_group("rope");
      rope.set("style", style);
      rope.set("rotary_dim", rotary_dim);
      rope.set("inv_freq", std::span<const double>(inv_freq));
    });
  };
  CHECK(with_rope("half", 4, {1, 0.1}) == "");
  CHECK_THAT(with_rope("whole", 4, {1, 0.1}), Catch::Contains("expected half or interleaved, found 'whole'"));
  CHECK_THAT(with_rope("half", 3, {1}), Catch::Contains("expected an even number, found 3"));
  CHECK_THAT(with_rope("half", 4, {1}), Catch::Contains("expected 2 values (rotary_dim / 2), found 1"));
  CHECK_THAT(with_rope("half", 4, {1, INFINITY}), Catch::Contains("found inf"));
}

TEST_CASE("wrong datasets are refused with what was expected and found") {
  const auto with_shape = [](const char* path, hdf5::Shape shape) {
    RawTrace raw;
    raw.shapes[path] = std::move(shape);
    return refusal(raw);
  };
  const auto with_type = [](const char* path, Type type) {
    RawTrace raw;
    raw.types[path] = type;
    return refusal(raw);
  };
  CHECK_THAT(with_shape("layers/000/k", {2, 11, 4}), Catch::Contains("expected shape (2, 12, 4), found (2, 11, 4)"));
  CHECK_THAT(with_shape("layers/000/q", {4, 5, 4}), Catch::Contains("expected shape (4, 12, 4)"));
  CHECK_THAT(with_shape("layers/000/v", {2, 12}), Catch::Contains("found (2, 12)"));
  CHECK_THAT(with_shape("tokens/id", {0}), Catch::Contains("at least one token"));
  CHECK_THAT(with_shape("tokens/id", {3, 4}), Catch::Contains("at least one token"));
  CHECK_THAT(with_shape("tokens/phase", {13}), Catch::Contains("expected shape (12), found (13)"));
  CHECK_THAT(with_shape("n_valid", {2}), Catch::Contains("expected one integer"));
  CHECK_THAT(with_type("layers/000/k", Type::i32), Catch::Contains("found int32"));
  CHECK_THAT(with_type("layers/000/v", Type::f64), Catch::Contains("found float64"));
  CHECK_THAT(with_type("layers/000/v", Type::f16),
             Catch::Contains("expected f32 like the rest of q, k and v, found f16"));
  CHECK_THAT(with_type("tokens/id", Type::f32), Catch::Contains("must hold integers, but holds float32"));

  RawTrace raw;
  raw.n_valid = 13;
  CHECK_THAT(refusal(raw), Catch::Contains("expected from 1 to 12 valid tokens, found 13"));
  raw.n_valid = 0;
  CHECK_THAT(refusal(raw), Catch::Contains("found 0"));
  raw.n_valid = ~std::uint64_t{0};
  CHECK_THAT(refusal(raw), Catch::Contains("n_valid"));
  raw = {};
  raw.phase[0] = 1;
  CHECK_THAT(refusal(raw), Catch::Contains("at least one prompt token"));
  raw = {};
  raw.phase[9] = 0;
  CHECK_THAT(refusal(raw), Catch::Contains("phase 0 at token 9"));
  raw = {};
  raw.phase[9] = 2;
  CHECK_THAT(refusal(raw), Catch::Contains("phase[9]: expected a value from 0 to 1, found 2"));

  const auto on_layers = [](const char* name) {
    return refusal([=](const Group& root) { root.group("layers").create_group(name); });
  };
  CHECK_THAT(on_layers("002"), Catch::Contains("layer numbers below n_layers = 2"));
  CHECK_THAT(on_layers("1"), Catch::Contains("layer groups named 000, 001, ..., found '1'"));
  CHECK_THAT(on_layers("001"), Catch::Contains("/layers/001/k is missing"));
  const auto on_layer = [](const char* name, std::vector<std::int32_t> values) {
    return refusal([=](const Group& root) {
      root.group("layers").group("000").write_column(name, std::span<const std::int32_t>(values));
    });
  };
  CHECK_THAT(on_layer("q_indx", {1}), Catch::Contains("the member 'q_indx'"));
  CHECK_THAT(on_layer("out_index", {1}), Catch::Contains("both out and out_index"));
  CHECK_THAT(on_layer("q_index", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10}), Catch::Contains("10 after 10"));
  CHECK_THAT(on_layer("q_index", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12}), Catch::Contains("12 after 10"));
  CHECK_THAT(on_layer("q_index", {-1, 1}), Catch::Contains("found -1"));
  CHECK(on_layer("q_index", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}) == "");
  CHECK_THAT(refusal([](const Group& root) {
               const std::vector<std::string> names = {"a"};
               const std::vector<std::int32_t> begins = {5}, ends = {3};
               const Group spans = root.group("tokens").create_group("spans");
               spans.write_column("name", std::span<const std::string>(names));
               spans.write_column("begin", std::span<const std::int32_t>(begins));
               spans.write_column("end", std::span<const std::int32_t>(ends));
             }),
             Catch::Contains("expected begin before end, found 5 to 3"));
}

TEST_CASE("a value that is not finite is named with dataset, head, token and channel") {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    const TemporaryFolder folder;
    RawTrace raw;
    raw.k[(1 * 12 + 7) * 4 + 2] = bad;
    raw.write(folder / "t.h5");
    const TraceReader trace(folder / "t.h5");
    std::vector<float> k(12 * 4);
    trace.read_k(0, 0, 0, 12, k);
    CHECK_THROWS_WITH(trace.read_k(0, 1, 0, 12, k), Catch::Contains("t.h5: /layers/000/k: expected finite values") &&
                                                        Catch::Contains("head 1, token 7, channel 2"));
    CHECK_THROWS_AS(verify(trace), TraceError);
  }
}

TEST_CASE("a truncated file is refused, wherever it ends") {
  const TemporaryFolder folder;
  for (const Profile profile : {Profile::working, Profile::archive}) {
    write_small(folder / "a.h5", {.profile = profile, .extras = true});
    const std::string right = content_or_refusal(folder / "a.h5");
    REQUIRE(right != "");
    const std::vector<char> bytes = file_bytes(folder / "a.h5");
    for (std::size_t n = 0; n < bytes.size(); n += 1 + bytes.size() / 97) {
      write_bytes(folder / "cut.h5", {bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n)});
      CHECK(content_or_refusal(folder / "cut.h5") == "");
    }
  }
}

TEST_CASE("a flipped bit is refused or changes nothing") {
  const TemporaryFolder folder;
  std::mt19937_64 random(7);
  for (const Profile profile : {Profile::working, Profile::archive}) {
    write_small(folder / "a.h5", {.profile = profile, .extras = true});
    const std::string right = content_or_refusal(folder / "a.h5");
    REQUIRE(right != "");
    const std::vector<char> bytes = file_bytes(folder / "a.h5");
    std::size_t refused = 0;
    for (int i = 0; i < 500; ++i) {
      std::vector<char> flipped = bytes;
      const std::size_t at = random() % (i % 2 == 0 ? bytes.size() : std::min<std::size_t>(bytes.size(), 4096));
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << random() % 8));
      write_bytes(folder / "flipped.h5", flipped);
      const std::string content = content_or_refusal(folder / "flipped.h5");
      INFO("byte " << at);
      CHECK((content.empty() || content == right));
      refused += content.empty() ? 1 : 0;
    }
    CHECK(refused > 100);  // the flips do hit what is checked
  }
}

TEST_CASE("arrays that share bytes, and filters that are not ours, are refused") {
  const TemporaryFolder folder;
  const auto path = folder / "t.h5";
  write_bytes(path, std::vector<char>(4096, 0));
  const auto file = std::make_shared<const FileBytes>(path);
  const auto contiguous = [&](std::uint64_t offset, std::uint64_t bytes) {
    return StoredArray(file, "t.h5: /a", ElementType::f32, {1, 4, 4}, {{}, false, false, {{offset, bytes}}}, 4);
  };
  const StoredArray a = contiguous(100, 64), b = contiguous(163, 64), c = contiguous(164, 64);
  const StoredArray* const apart[] = {&a, &c};
  const StoredArray* const over[] = {&a, &b};
  CHECK_NOTHROW(check_extents(apart, *file));
  CHECK_THROWS_WITH(check_extents(over, *file), Catch::Contains("overlap at byte 163"));
  CHECK_THROWS_WITH(contiguous(4090, 64), Catch::Contains("truncated or damaged"));
  CHECK_THROWS_WITH(contiguous(~std::uint64_t{0} - 8, 64), Catch::Contains("truncated or damaged"));
  CHECK_THROWS_WITH(contiguous(0, 0), Catch::Contains("has no data"));
  CHECK_THROWS_WITH(contiguous(0, 60), Catch::Contains("expected 64 bytes, found 60"));

  const auto chunked = [&](std::uint64_t bytes, hdf5::Shape chunk) {
    return StoredArray(file, "t.h5: /a", ElementType::f32, {1, 4, 4}, {std::move(chunk), true, true, {{0, bytes}}}, 4);
  };
  std::vector<float> out(16);
  CHECK_THROWS_WITH(chunked(40, {1, 4, 4}).read(0, 0, 4, out), Catch::Contains("does not inflate to its 64 bytes"));
  CHECK_THROWS_WITH(chunked(0, {1, 4, 4}).read(0, 0, 4, out), Catch::Contains("was never written"));
  CHECK_THROWS_WITH(chunked(40, {1, 1 << 20, 1 << 20}), Catch::Contains("chunks of"));
  CHECK_THROWS_WITH(chunked(4, {1, 1 << 13, 4}), Catch::Contains("cannot hold"));
}

}  // namespace kvreplay::test
