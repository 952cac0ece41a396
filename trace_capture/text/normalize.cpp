#include "trace_capture/text/normalize.hpp"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <new>

#include "policies/errors.hpp"
#include "trace_capture/text/utf8.hpp"

namespace kvreplay::text {
namespace {

struct Marks {
  char32_t first, last;
};

// Characters that were assigned after Unicode 9.0 and that later versions reorder or compose. To Unicode 9.0 they are
// unassigned: nothing moves across them. tests/trace_capture/tokenizers/unicode.py measures this list.
constexpr Marks kNewerMarks[] = {
    {0x005C8, 0x005C9}, {0x007FD, 0x007FD}, {0x00897, 0x0089F}, {0x008CA, 0x008D3}, {0x009FE, 0x009FE},
    {0x00C3C, 0x00C3C}, {0x00D3B, 0x00D3C}, {0x00EBA, 0x00EBA}, {0x01715, 0x01715}, {0x01ABF, 0x01AF0},
    {0x01DF6, 0x01DFA}, {0x0A82C, 0x0A82C}, {0x105C9, 0x105C9}, {0x105D2, 0x105D2}, {0x105DA, 0x105DA},
    {0x105E4, 0x105E4}, {0x10D24, 0x10D27}, {0x10D69, 0x10D6D}, {0x10EAB, 0x10EAC}, {0x10ECB, 0x10ECF},
    {0x10EF0, 0x10EFB}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070},
    {0x1133B, 0x1133B}, {0x11383, 0x11383}, {0x11385, 0x11385}, {0x1138E, 0x1138E}, {0x11391, 0x11391},
    {0x113B8, 0x113B8}, {0x113BB, 0x113BB}, {0x113C2, 0x113C2}, {0x113C5, 0x113C5}, {0x113C7, 0x113C9},
    {0x113CE, 0x113D0}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11938, 0x11938},
    {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
    {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x11F41, 0x11F42},
    {0x1611E, 0x16129}, {0x1612F, 0x1612F}, {0x16D67, 0x16D6A}, {0x16FF0, 0x16FF1}, {0x1D127, 0x1D128},
    {0x1D250, 0x1D252}, {0x1D25B, 0x1D25C}, {0x1D25F, 0x1D25F}, {0x1D280, 0x1D281}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF},
    {0x1E6E3, 0x1E6E3}, {0x1E6E6, 0x1E6E6}, {0x1E6EE, 0x1E6EF}, {0x1E6F5, 0x1E6F5},
};

bool is_newer_mark(char32_t c) {
  const Marks* const found = std::upper_bound(std::begin(kNewerMarks), std::end(kNewerMarks), c,
                                              [](char32_t value, const Marks& marks) { return value < marks.first; });
  return found != std::begin(kNewerMarks) && c <= (found - 1)->last;
}

int combining_class(utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; }

// Sorts each run of marks by combining class, marks of one class staying in order (Unicode Standard, D109). utf8proc
// does it too, but in quadratic time.
void reorder(std::vector<utf8proc_int32_t>& characters) {
  const auto is_mark = [](utf8proc_int32_t c) { return combining_class(c) != 0; };
  auto begin = characters.begin();
  while ((begin = std::find_if(begin, characters.end(), is_mark)) != characters.end()) {
    const auto end = std::find_if_not(begin, characters.end(), is_mark);
    std::stable_sort(begin, end,
                     [](utf8proc_int32_t a, utf8proc_int32_t b) { return combining_class(a) < combining_class(b); });
    begin = end;
  }
}

void decompose(char32_t c, std::vector<utf8proc_int32_t>& out) {
  constexpr utf8proc_ssize_t kLongest = 16;  // the longest canonical decomposition has 4 characters
  utf8proc_int32_t parts[kLongest];
  int boundary = 0;
  const utf8proc_ssize_t n =
      utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), parts, kLongest, UTF8PROC_DECOMPOSE, &boundary);
  KVREPLAY_CHECK(n >= 0 && n <= kLongest);
  out.insert(out.end(), parts, parts + n);
}

// Appends the composed form of characters and empties them.
void compose(std::vector<utf8proc_int32_t>& characters, std::string& out) {
  reorder(characters);
  const utf8proc_ssize_t n =
      utf8proc_normalize_utf32(characters.data(), static_cast<utf8proc_ssize_t>(characters.size()),
                               static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  KVREPLAY_CHECK(n >= 0);
  for (utf8proc_ssize_t i = 0; i < n; ++i) {
    append(out, static_cast<char32_t>(characters[static_cast<std::size_t>(i)]));
  }
  characters.clear();
}

}  // namespace

std::string nfc(std::string_view text) {
  const auto is_ascii = [](char c) { return static_cast<unsigned char>(c) < 0x80; };
  if (std::all_of(text.begin(), text.end(), is_ascii)) {
    return std::string(text);
  }
  std::string out;
  out.reserve(text.size());
  std::vector<utf8proc_int32_t> characters;  // between two newer marks, decomposed
  for (std::size_t i = 0; i < text.size(); i += character_size(text.substr(i))) {
    const char32_t c = code_point(text.substr(i));
    if (is_newer_mark(c)) {
      compose(characters, out);
      append(out, c);
    } else {
      decompose(c, characters);
    }
  }
  compose(characters, out);
  return out;
}

namespace {

void refuse_growth(std::size_t bytes, std::size_t most) {
  if (bytes > most) {
    throw ConfigError(fmt::format(
        "the replacements of tokenizer.json make {} bytes of a text, more than the {} that its length allows; pass "
        "token ids with --tokens instead",
        bytes, most));
  }
}

}  // namespace

std::string replace_all(std::string_view text, std::string_view what, std::string_view with, std::size_t most) {
  std::size_t bytes = text.size();
  for (std::size_t found = text.find(what); found != std::string_view::npos && with.size() > what.size();
       found = text.find(what, found + what.size())) {
    bytes += with.size() - what.size();
    refuse_growth(bytes, most);
  }
  std::string out;
  out.reserve(bytes);
  for (std::size_t found = 0; (found = text.find(what)) != std::string_view::npos;) {
    out += text.substr(0, found);
    out += with;
    text.remove_prefix(found + what.size());
  }
  out += text;
  return out;
}

std::string literal_pattern(const Node& pattern) {
  pattern.only({"String"});
  std::string what = pattern.at("String").text();
  if (what.empty()) {
    pattern.refuse("must not be empty");
  }
  return what;
}

Normalizer::Normalizer(const std::optional<Node>& node) {
  if (node) {
    add(*node);
  }
}

void Normalizer::add(const Node& node) {
  if (steps_.size() == kMaxSteps) {
    node.refuse(fmt::format("more than {} steps are not supported", kMaxSteps));
  }
  const std::string type = node.type();
  if (type == "Sequence") {
    node.only({"type", "normalizers"});
    for (const Node& step : node.at("normalizers").items()) {
      add(step);
    }
  } else if (type == "NFC") {
    node.only({"type"});
    steps_.emplace_back(Nfc{});
  } else if (type == "Prepend") {
    node.only({"type", "prepend"});
    steps_.emplace_back(Prepend{node.at("prepend").text()});
  } else if (type == "Replace") {
    node.only({"type", "pattern", "content"});
    steps_.emplace_back(Replace{literal_pattern(node.at("pattern")), node.at("content").text()});
  } else {
    node.refuse(fmt::format("type {} is not supported (Sequence, NFC, Prepend, Replace are)", in_quotes(type)));
  }
}

std::string Normalizer::operator()(std::string_view text) const {
  std::string out(text);
  const std::size_t most = most_bytes(text.size());
  for (const auto& step : steps_) {
    refuse_growth(out.size(), most);
    if (std::holds_alternative<Nfc>(step)) {
      out = nfc(out);
    } else if (const auto* prepend = std::get_if<Prepend>(&step)) {
      if (!out.empty()) {
        out.insert(0, prepend->prefix);
      }
    } else {
      const auto& replace = std::get<Replace>(step);
      out = replace_all(out, replace.what, replace.with, most);
    }
  }
  return out;
}

}  // namespace kvreplay::text
