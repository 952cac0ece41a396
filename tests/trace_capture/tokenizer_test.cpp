// Text to ids: the ids that Hugging Face's tokenizers gave to the texts of fixtures.json, examples small enough to
// check by hand, and files that lie.
#include "trace_capture/tokenizer.hpp"

#include <catch2/catch.hpp>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "policies/errors.hpp"
#include "trace_capture/text/byte_letters.hpp"
#include "trace_capture/text/normalize.hpp"
#include "trace_capture/text/regex.hpp"
#include "trace_capture/text/utf8.hpp"

namespace kvreplay {
namespace {

using nlohmann::json;
using Ids = std::vector<std::int32_t>;

// A folder with one tokenizer.json, gone with the test.
class Folder {
 public:
  explicit Folder(const std::string& file) {
    static int n = 0;
    const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
    path_ = std::filesystem::temp_directory_path() /
            ("kvreplay_tokenizer_" + std::to_string(now) + "_" + std::to_string(n++));
    std::filesystem::create_directory(path_);
    std::ofstream(path_ / "tokenizer.json", std::ios::binary) << file;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  Tokenizer open() const { return Tokenizer(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

Tokenizer open(const json& file) { return Folder(file.dump()).open(); }

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

const std::filesystem::path kTokenizers = KVREPLAY_TOKENIZERS;

// "abc" by merging; nothing is done to the text.
json small_file() {
  return json::parse(R"({
    "version": "1.0",
    "added_tokens": [{"id": 6, "content": "<s>", "special": true}],
    "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5},
              "merges": ["b c", "a b", "a bc"]}})");
}

template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

std::string error_of_file(const std::string& file) {
  const Folder folder(file);
  std::string message = error_of([&] { folder.open(); });
  const std::string path = (folder.path() / "tokenizer.json").string();
  if (message.starts_with(path)) {  // as it must
    message.replace(0, path.size(), "FILE");
  }
  return message;
}

// The message when one place of the small file, a JSON pointer, holds value.
std::string error_with(const std::string& pointer, const json& value) {
  json file = small_file();
  file[json::json_pointer(pointer)] = value;
  return error_of_file(file.dump());
}

constexpr const char* kAdvice = "; pass token ids with --tokens instead";

TEST_CASE("text becomes the ids that Hugging Face's tokenizers gives it") {
  const json fixtures = json::parse(read(kTokenizers / "fixtures.json"));
  const auto texts = fixtures["texts"].get<std::vector<std::string>>();
  REQUIRE(texts.size() > 90);
  REQUIRE(fixtures["ids"].size() >= 7);
  for (const auto& [name, expected] : fixtures["ids"].items()) {
    const Tokenizer tokenizer(kTokenizers / name);
    const json& decoded = fixtures["decoded"][name];
    REQUIRE(expected.size() == texts.size());
    for (std::size_t i = 0; i < texts.size(); ++i) {
      INFO(name << ": " << json(texts[i]).dump(-1, ' ', true));
      const Ids ids = tokenizer.encode(texts[i]);
      CHECK(ids == expected[i].get<Ids>());
      if (i < decoded.size()) {
        CHECK(tokenizer.decode(ids) == decoded[i].get<std::string>());
      }
    }
  }
}

TEST_CASE("pairs merge by rank, the leftmost of equal ones first") {
  const Tokenizer tokenizer = open(small_file());
  CHECK(tokenizer.encode("abc") == Ids{5});      // b c first, then a bc
  CHECK(tokenizer.encode("abbc") == Ids{3, 4});  // b c takes the second b, a b the first
  CHECK(tokenizer.encode("cba") == Ids{2, 1, 0});
  CHECK(tokenizer.encode("").empty());
  CHECK(tokenizer.encode("axb") == Ids{3});  // an unknown character without an unknown token is dropped

  json file = small_file();
  file["model"]["vocab"] = {{"a", 0}, {"aa", 1}};
  file["model"]["merges"] = json::parse(R"([["a", "a"]])");
  file["added_tokens"] = nullptr;
  CHECK(open(file).encode("aaa") == Ids{1, 0});
}

TEST_CASE("with ignore_merges a word of the vocabulary needs no merges") {
  json file = small_file();
  file["model"]["vocab"]["cab"] = 6;
  file["added_tokens"] = nullptr;
  CHECK(open(file).encode("cab") == Ids{2, 3});
  file["model"]["ignore_merges"] = true;
  CHECK(open(file).encode("cab") == Ids{6});
}

TEST_CASE("characters without a token become bytes, or the unknown token") {
  json file = small_file();
  file["added_tokens"] = nullptr;
  file["model"]["vocab"]["?"] = 6;
  file["model"]["unk_token"] = "?";
  CHECK(open(file).encode("axyb") == Ids{0, 6, 6, 1});
  file["model"]["fuse_unk"] = true;
  CHECK(open(file).encode("axyb") == Ids{0, 6, 1});
  file["model"]["byte_fallback"] = true;
  file["model"]["vocab"]["<0xC3>"] = 7;
  file["model"]["vocab"]["<0xA9>"] = 8;
  CHECK(open(file).encode("a\u00e9b") == Ids{0, 7, 8, 1});
  CHECK(open(file).encode("a\u00e8b") == Ids{0, 6, 1});  // <0xA8> is missing
}

TEST_CASE("the template's tokens stand around the text unless told otherwise") {
  json file = small_file();
  file["post_processor"] = json::parse(R"({"type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
               {"SpecialToken": {"id": "end", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [6], "tokens": ["<s>"]},
                       "end": {"id": "end", "ids": [2, 2], "tokens": ["c", "c"]}}})");
  const Tokenizer tokenizer = open(file);
  CHECK(tokenizer.encode("ab") == Ids{6, 3, 2, 2});
  CHECK(tokenizer.encode("") == Ids{6, 2, 2});
  CHECK(tokenizer.encode("ab", false) == Ids{3});
  CHECK(tokenizer.encode("<s>ab", false) == Ids{6, 3});
}

TEST_CASE("added tokens are cut out, the longest first, with the spaces they claim") {
  json file = small_file();
  file["added_tokens"] = json::parse(R"([
    {"id": 6, "content": "<s>"}, {"id": 7, "content": "<s>>"}, {"id": 8, "content": "[l]", "lstrip": true},
    {"id": 9, "content": "[r]", "rstrip": true}, {"id": 10, "content": "w", "single_word": true}])");
  file["model"]["vocab"][" "] = 11;
  const auto refused = error_of_file(file.dump());
  CHECK(refused.find("\"<s>\" has the id 6, but the order of the file gives it 7") != std::string::npos);
  file["model"]["vocab"].erase(" ");
  const Tokenizer tokenizer = open(file);
  CHECK(tokenizer.encode("a<s>>b<s><s") == Ids{0, 7, 1, 6});
  CHECK(tokenizer.vocab_size() == 11);
  CHECK(tokenizer.encode("a w,awa\u00e9w w") == Ids{0, 10, 0, 0, 10});  // words: the first and the last
  CHECK(tokenizer.decode(tokenizer.encode("a \t[l]b[r] \u3000c")) == "a [l] b [r] c");
}

TEST_CASE("added tokens do not overlap") {
  json file = small_file();
  file["added_tokens"] =
      json::parse(R"([{"id": 6, "content": "xx"}, {"id": 7, "content": "xyx", "single_word": true}])");
  const Tokenizer tokenizer = open(file);
  CHECK(tokenizer.encode("xxxa") == Ids{6, 0});    // the third x has no token
  CHECK(tokenizer.encode("axyxxa") == Ids{0, 0});  // xyx is no word here, and xx inside of it is not looked for
}

TEST_CASE("prepend_scheme first means the first word of the whole text") {
  json file = small_file();
  file["model"]["vocab"]["_"] = 6;
  file["added_tokens"] = json::parse(R"([{"id": 7, "content": "<s>"}])");
  file["pre_tokenizer"] = json::parse(R"({"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"String": "b"}, "behavior": "Isolated", "invert": false},
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"}]})");
  CHECK(open(file).encode("aba c") == Ids{6, 0, 1, 0, 6, 2});
  CHECK(open(file).encode("<s>a") == Ids{7, 0});
  file["pre_tokenizer"]["pretokenizers"][1]["prepend_scheme"] = "always";
  CHECK(open(file).encode("aba c") == Ids{6, 0, 6, 1, 6, 0, 6, 2});
  CHECK(open(file).encode("<s>a") == Ids{7, 6, 0});
  file["pre_tokenizer"]["pretokenizers"][1]["prepend_scheme"] = "never";
  CHECK(open(file).encode("aba c") == Ids{0, 1, 0, 6, 2});
}

TEST_CASE("a text that is not UTF-8 is refused at its first bad byte") {
  const Tokenizer tokenizer = open(small_file());
  const auto error = [&](const std::string& text) { return error_of([&] { tokenizer.encode(text); }); };
  CHECK(error("abc\xff") ==
        "the text is not UTF-8 at byte 3 (0xFF); save it as UTF-8, or pass token ids with --tokens");
  for (const std::string bad : {"\x80", "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80",
                                "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xe2\x82", "\xf0\x9f\x98", "\xc3("}) {
    INFO(json(bad).dump(-1, ' ', true, json::error_handler_t::replace));
    CHECK(error("\u00e9" + bad).find("not UTF-8 at byte 2 ") != std::string::npos);
  }
  CHECK(error(std::string("a\0b", 3)) == "no error");
  CHECK(error("\U0010ffff\uffff\ud7ff\ue000") == "no error");
}

TEST_CASE("a piece shows one token's text, and bytes that are no character as such") {
  const Tokenizer bytes(kTokenizers / "llama3");
  const auto euro = bytes.encode("\u20ac", false);
  std::string pieces;
  for (const std::int32_t id : euro) {
    pieces += bytes.piece(id);
  }
  CHECK((pieces == "\u20ac" || pieces == "<0xE2><0x82><0xAC>"));
  CHECK(bytes.piece(bytes.encode(" the", false).at(0)) == " the");
  CHECK(bytes.piece(bytes.encode("\n", false).at(0)) == "\n");
  CHECK(bytes.piece(bytes.encode(std::string(1, '\0'), false).at(0)) == "<0x00>");
  CHECK(bytes.piece(bytes.encode("", true).at(0)) == "<|begin_of_text|>");
  CHECK(bytes.piece(-1).empty());
  CHECK(bytes.piece(bytes.vocab_size()).empty());
  CHECK(bytes.decode(Ids{-1, bytes.vocab_size(), 1 << 30}).empty());

  const Tokenizer spaces(kTokenizers / "llama2");
  CHECK(spaces.piece(spaces.encode("the", false).at(0)) == " the");
  CHECK(spaces.piece(spaces.encode("\xf3\xb0\x80\x80", false).at(1)) == "<0xF3>");
  CHECK(spaces.piece(1) == "<s>");
}

TEST_CASE("half a character decodes to a replacement") {
  const Tokenizer tokenizer(kTokenizers / "gpt2");
  Ids ids = tokenizer.encode("a\U0001f600");
  REQUIRE(ids.size() > 2);
  ids.pop_back();
  CHECK(tokenizer.decode(ids) == " a\ufffd");

  // With byte fallback there is one for each byte of a run that is no text.
  const Tokenizer fallback(kTokenizers / "llama2");
  ids = fallback.encode("\U000f0000", false);
  REQUIRE(ids.size() == 5);  // the space in front and four bytes
  CHECK(fallback.decode(ids) == "\U000f0000");
  ids.pop_back();
  CHECK(fallback.decode(ids) == "\ufffd\ufffd\ufffd");
}

TEST_CASE("a word of a million letters takes no quadratic time") {
  // Quadratic time would be hours here; the limit is generous for a slow machine under a sanitizer.
  const Tokenizer tokenizer(kTokenizers / "llama2");
  const auto start = std::chrono::steady_clock::now();
  const std::string letters(std::size_t{1} << 20, 'a');
  const Ids ids = tokenizer.encode(letters);
  CHECK(tokenizer.decode(ids) == "<s> " + letters);
  const std::string spaces = std::string(std::size_t{1} << 20, ' ') + "x";
  CHECK(Tokenizer(kTokenizers / "qwen2").decode(Tokenizer(kTokenizers / "qwen2").encode(spaces)) == spaces);
  std::string marks = "a";
  for (int i = 0; i < 1 << 18; ++i) {
    marks += "\u0315\u0300";  // classes 232 and 230: every pair is out of order
  }
  CHECK(text::nfc(marks).size() == marks.size() - 1);  // one U+0300 and the a become U+00E0
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(120));
}

TEST_CASE("what is not supported is refused by name, with the way out") {
  CHECK(error_with("/model/type", "Unigram") ==
        std::string("FILE: model.type: \"Unigram\" is not supported (BPE is)") + kAdvice);
  CHECK(error_with("/model/type", "WordPiece").find("\"WordPiece\" is not supported") != std::string::npos);
  CHECK(error_with("/normalizer", {{"type", "Lowercase"}}) ==
        std::string("FILE: normalizer: type \"Lowercase\" is not supported (Sequence, NFC, Prepend, Replace are)") +
            kAdvice);
  CHECK(error_with("/normalizer",
                   json::parse(R"({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]})")) ==
        std::string(
            "FILE: normalizer.normalizers[1]: type \"NFKC\" is not supported (Sequence, NFC, Prepend, Replace are)") +
            kAdvice);
  CHECK(error_with("/pre_tokenizer", {{"type", "Whitespace"}})
            .find("pre_tokenizer: type \"Whitespace\" is not supported") != std::string::npos);
  CHECK(error_with("/decoder", {{"type", "WordPiece"}}).find("decoder: type \"WordPiece\" is not supported") !=
        std::string::npos);
  CHECK(error_with("/post_processor", {{"type", "RobertaProcessing"}})
            .find("post_processor: type \"RobertaProcessing\" is not supported") != std::string::npos);
  CHECK(error_with("/version", "2.0").find("version: \"2.0\" is not supported") != std::string::npos);
  CHECK(error_with("/model/dropout", 0.1).find("model.dropout: \"0.1\" is not supported (0 is)") != std::string::npos);
  CHECK(error_with("/model/end_of_word_suffix", "</w>").find("model.end_of_word_suffix: \"</w>\" is not supported") !=
        std::string::npos);
  CHECK(error_with("/model/new_option", 1).find("model: option \"new_option\" is not supported") != std::string::npos);
  CHECK(error_with("/normalizer", json::parse(R"({"type": "Replace", "pattern": {"Regex": " +"}, "content": ""})"))
            .find("normalizer.pattern: option \"Regex\"") != std::string::npos);

  const auto with_pattern = [](const std::string& pattern) {
    return error_with(
        "/pre_tokenizer",
        {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}});
  };
  CHECK(with_pattern("\\w+") ==
        std::string("FILE: pre_tokenizer.pattern.Regex: '\\w' in a regular expression is not supported") + kAdvice);
  for (const auto& [pattern, named] :
       std::vector<std::pair<std::string, std::string>>{{"^a", "'^'"},
                                                        {"a$", "'$'"},
                                                        {"\\bx", "'\\b'"},
                                                        {"(?i)a", "'(?i)'"},
                                                        {"(?x: a)", "'(?x:'"},
                                                        {"(a)\\1", "'\\1'"},
                                                        {"\\h", "'\\h'"},
                                                        {"\\p{Greek}", "'\\p{Greek}'"},
                                                        {"\\pL", "'\\p'"},
                                                        {"[a[b]]", "'[ inside of a class'"},
                                                        {"[a&&b]", "'&&'"},
                                                        {"[]a]", "'[]'"},
                                                        {"[a", "'[ without ]'"},
                                                        {"a{2}+", "'{2}+'"},
                                                        {"a{2}?", "'{2}?'"},
                                                        {"a{,}", "'{,}'"},
                                                        {"a{x}", "'{x}'"},
                                                        {"*a", "'*'"},
                                                        {"a)", "')'"},
                                                        {"\\\n", "'\\?'"},
                                                        {"(*UTF)a", "'(*UT'"},
                                                        {"(?i:stra\u00dfe)", "'(?i:st'"},
                                                        {"(?i:\\p{L})", "inside of (?i:'"},
                                                        {"[\\S]", "'\\S'"},
                                                        {"\\Qa\\E", "'\\Q'"},
                                                        {"a{99999}", "does not compile"},
                                                        {"(a", "does not compile"},
                                                        {"[b-a]", "does not compile"}}) {
    INFO(pattern);
    CHECK(with_pattern(pattern).find(named) != std::string::npos);
    CHECK(with_pattern(pattern).ends_with(kAdvice));
  }
}

TEST_CASE("a file that lies is refused in one sentence") {
  CHECK(error_of([] { Tokenizer(std::filesystem::path("/nowhere")); }) ==
        std::string("/nowhere/tokenizer.json: cannot be opened: No such file or directory") + kAdvice);
  const auto refused = [](const std::string& pointer, const json& value, const std::string& part) {
    const std::string message = error_with(pointer, value);
    INFO(message);
    CHECK(message.starts_with("FILE: " + part));
    CHECK(message.ends_with(kAdvice));
    CHECK(message.find('\n') == std::string::npos);
  };
  refused("/model", 7, "model: must be an object, found number");
  refused("/model", nullptr, "has no 'model'");
  refused("/model/vocab", json::array({"a"}), "model.vocab: must be an object of tokens and their ids");
  refused("/model/vocab", json::object(), "model.vocab: must be an object");
  refused("/model/vocab/abc", -1, "model.vocab.\"abc\": token id -1 is outside [0, 4194303]");
  refused("/model/vocab/abc", 2147483648U, "model.vocab.\"abc\": token id 2147483648 is outside");
  refused("/model/vocab/abc", 1e30, "model.vocab.\"abc\": must be a token id, found number");
  refused("/model/vocab/abc", "5", "model.vocab.\"abc\": must be a token id, found string");
  refused("/model/vocab/abc", 3, "model.vocab: \"ab\" and \"abc\" have the same id 3");
  refused("/model/merges", "b c", "model.merges: must be a list, found string");
  refused("/model/merges/1", "a  b", "model.merges[1]: must be two tokens with a space between them");
  refused("/model/merges/1", "ab", "model.merges[1]: must be two tokens with a space between them");
  refused("/model/merges/1", json::array({"a", "b", "c"}), "model.merges[1]: must be two tokens");
  refused("/model/merges/1", json::array({"a", 1}), "model.merges[1]: must be two tokens");
  refused("/model/merges/1", "a z", "model.merges[1]: \"z\" is not in the vocabulary");
  refused("/model/merges/1", "c a", "model.merges[1]: \"ca\" is not in the vocabulary");
  refused("/model/unk_token", "<unk>", "model.unk_token: \"<unk>\" is not in the vocabulary");
  refused("/model/fuse_unk", "yes", "model.fuse_unk: must be true or false, found string");
  refused("/added_tokens", json::object(), "added_tokens: must be a list, found object");
  refused("/added_tokens/0", "<s>", "added_tokens[0]: must be an object, found string");
  refused("/added_tokens/0/content", nullptr, "added_tokens[0]: has no 'content'");
  refused("/added_tokens/0/id", 9, "added_tokens[0]: \"<s>\" has the id 9, but the order of the file gives it 6");
  refused("/added_tokens/0/content", "ab",
          "added_tokens[0]: \"ab\" has the id 6, but the order of the file gives it 3");
  refused("/added_tokens/0/lstrip", 1, "added_tokens[0].lstrip: must be true or false");
  refused("/normalizer", json::array(), "normalizer: must be an object, found array");
  refused("/normalizer", {{"type", 3}}, "normalizer.type: must be text, found number");
  refused("/normalizer", {{"type", std::string(1000, 'x') + "\n"}}, "normalizer: type \"xxxxxx");
  refused("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "ab"}},
          "pre_tokenizer.replacement: must be one character, found \"ab\"");
  refused("/pre_tokenizer", json::parse(R"({"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated"})"),
          "pre_tokenizer.pattern: must not be empty");
  refused("/pre_tokenizer", json::parse(R"({"type": "Split", "pattern": {"String": "a"}, "behavior": "Joined"})"),
          "pre_tokenizer.behavior: \"Joined\" is not supported");
  refused("/post_processor", json::parse(R"({"type": "TemplateProcessing", "single": [], "special_tokens": {}})"),
          "post_processor: the template must have the sequence A once");
  refused(
      "/post_processor",
      json::parse(R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}], "special_tokens": {}})"),
      "post_processor.single[0]: \"x\" is not among its special_tokens");
  refused(
      "/post_processor",
      json::parse(
          R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}, {"Sequence": {"id": "A"}}], "special_tokens": {"x": {"ids": [99]}}})"),
      "post_processor: no token has the id 99");
}

TEST_CASE("bytes that are no tokenizer.json end in one sentence") {
  CHECK(error_of_file("") == std::string("FILE: expected JSON, found none from byte 1 on") + kAdvice);
  CHECK(error_of_file("[]").starts_with("FILE: expected a JSON object, found []"));
  CHECK(error_of_file("{\"model\": \"\xff\"}").starts_with("FILE: expected JSON, found none from byte "));
  CHECK(error_of_file("{\"a\": 1e999999}").starts_with("FILE: expected JSON, found a number that is too large"));
  for (const std::size_t depth : {std::size_t{100}, std::size_t{1} << 20}) {
    CHECK(error_of_file(std::string(depth, '[')).starts_with("FILE: JSON is nested deeper than 64 levels"));
  }
  std::string nested;
  for (int i = 0; i < 100; ++i) {
    nested += R"({"type": "Sequence", "normalizers": [)";
  }
  CHECK(error_of_file("{\"normalizer\": " + nested).starts_with("FILE: JSON is nested deeper than 64 levels"));

  const std::string whole = small_file().dump();
  for (std::size_t n = 0; n < whole.size(); ++n) {
    CHECK(error_of_file(whole.substr(0, n)).starts_with("FILE: expected JSON, found none from byte "));
  }
}

TEST_CASE("a damaged file is either read or refused") {
  std::mt19937 random(1);
  int read_after_all = 0;
  for (const char* name : {"gpt2", "llama2", "metaspace_always"}) {
    const std::string whole = read(kTokenizers / name / "tokenizer.json");
    for (int trial = 0; trial < 100; ++trial) {
      std::string damaged = whole;
      // Most of a file is vocabulary; the first part says what everything means.
      const std::size_t reach = trial % 2 == 0 ? std::min<std::size_t>(damaged.size(), 2500) : damaged.size();
      for (int changes = 1 + trial % 3; changes > 0; --changes) {
        const std::size_t at = random() % reach;
        const std::string replacements = "0123456789{}[]\",:\\anultrue \xc3\xff";
        damaged[at] = trial % 5 == 0 ? static_cast<char>(random() % 256) : replacements[random() % replacements.size()];
      }
      const Folder folder(damaged);
      const std::string message = error_of([&] {
        const Tokenizer tokenizer = folder.open();
        tokenizer.decode(tokenizer.encode("The caf\u00e9 <s> \U0001f600\n\n 12345"));
        ++read_after_all;
      });
      CHECK(message.find('\n') == std::string::npos);
    }
  }
  CHECK(read_after_all > 10);
}

TEST_CASE("ill-formed bytes are replaced part by part") {
  CHECK(text::with_replacements("a\xe2\x82"
                                "b") == "a\ufffdb");  // one start of a character
  CHECK(text::with_replacements("\xf0\x9f\x98\x80\xf0\x9f") == "\U0001f600\ufffd");
  CHECK(text::with_replacements("\xed\xa0\x80") == "\ufffd\ufffd\ufffd");  // a surrogate: nothing of it may begin one
  CHECK(text::with_replacements("\xc0\xaf\xff") == "\ufffd\ufffd\ufffd");
}

TEST_CASE("every byte has a letter of its own") {
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) {
    bytes += static_cast<char>(static_cast<unsigned char>(byte));
  }
  const std::string letters = text::byte_letters(bytes);
  CHECK(text::bytes_of_letters(letters) == bytes);
  CHECK(text::byte_letters(" \n\xad!") == "\u0120\u010a\u0143!");
  CHECK(text::bytes_of_letters("\u2581") == std::nullopt);
  CHECK(text::bytes_of_letters(" ") == std::nullopt);
}

TEST_CASE("composition is Unicode 9.0's, whatever the library knows") {
  CHECK(text::nfc("plain") == "plain");
  CHECK(text::nfc("e\u0301A\u030a\u1100\u1161\u11a8") == "\u00e9\u00c5\uac01");
  CHECK(text::nfc("q\u0307\u0323") == "q\u0323\u0307");      // classes 230, 220
  CHECK(text::nfc("\u212b\u0958") == "\u00c5\u0915\u093c");  // a singleton, an exclusion
  CHECK(text::nfc("a\u0345\u0301") == "\u00e1\u0345");
  // Assigned in Unicode 10.0 with class 232 and a composition of 13.0: left where they are.
  CHECK(text::nfc("a\u0345\u1df6\u0301") == "a\u0345\u1df6\u0301");
  CHECK(text::nfc("\U00011935\U00011930") == "\U00011935\U00011930");
  CHECK(text::nfc(std::string("\u00e9\0e\u0301", 6)) == std::string("\u00e9\0\u00e9", 5));
}

TEST_CASE("categories are Unicode 16.0's, and U+180E is no space") {
  const auto count = [](const char* pattern, const std::string& of) { return text::Regex(pattern).matches(of).size(); };
  CHECK(count("\\p{L}", "a\u00e9\u4e00\U0002ebf0\U000105c0\u1c89") == 6);  // the last: Unicode 15.1, 16.0, 16.0
  CHECK(count("[\\p{N}]", "1\u0661\U0001e4f0\U00010d40") == 4);
  CHECK(count("\\s", " \t\n\x0b\x0c\r\xc2\x85\u00a0\u3000\u2028") == 10);
  CHECK(count("\\s", "\u180e\u200b\ufeff") == 0);
  CHECK(count("\\S|[^\\s]", "\u180e") == 1);
}

}  // namespace
}  // namespace kvreplay
