#include "trace_capture/text/regex.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

#include "policies/errors.hpp"
#include "trace_capture/text/unicode_additions.hpp"
#include "trace_capture/text/utf8.hpp"

namespace kvreplay::text {
namespace {

// Unicode's White_Space. PCRE2's own \s adds U+180E, which lost that property in Unicode 6.3.
constexpr std::string_view kSpaceItems = R"(\x{9}-\x{d}\x{85}\p{Z})";

constexpr std::array<std::string_view, 36> kCategories = {
    "L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N",  "Nd", "Nl", "No", "P",  "Pc", "Pd", "Ps",
    "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk", "So", "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Co", "Cs"};

// Reads a pattern from left to right and writes it as PCRE2 with UTF and UCP understands it. What the two engines read
// differently is either rewritten or refused; refusing is cheap, a wrong split of the text is not.
class Translation {
 public:
  explicit Translation(std::string_view pattern) : rest_(pattern) {}

  std::string run() {
    while (!rest_.empty()) {
      step();
    }
    return out_;
  }

 private:
  [[noreturn]] static void refuse(std::string_view what) {
    throw std::invalid_argument(fmt::format("'{}' in a regular expression is not supported", what));
  }

  bool take(std::string_view expected) {
    if (!rest_.starts_with(expected)) {
      return false;
    }
    rest_.remove_prefix(expected.size());
    return true;
  }

  std::string_view take_character() {
    const std::string_view character = rest_.substr(0, character_size(rest_));
    rest_.remove_prefix(character.size());
    return character;
  }

  void step() {
    if (rest_[0] == '(') {
      open_group();
    } else if (take(")")) {
      if (caseless_.size() == 1) {
        refuse(")");
      }
      caseless_.pop_back();
      out_ += ')';
      atom_ = true;
    } else if (take("|")) {
      out_ += '|';
      atom_ = false;
      folded_.clear();
    } else if (rest_[0] == '?' || rest_[0] == '*' || rest_[0] == '+' || rest_[0] == '{') {
      quantifier();
    } else if (rest_[0] == '[') {
      char_class();
    } else if (rest_[0] == '\\') {
      escape();
    } else if (rest_[0] == '^' || rest_[0] == '$') {
      refuse(rest_.substr(0, 1));  // lines in Ruby's syntax, the whole text elsewhere
    } else {
      const std::string_view character = take_character();
      if (character == ".") {
        not_caseless(character);
      }
      literal(character, character);
    }
  }

  void open_group() {
    bool caseless = caseless_.back();
    for (const std::string_view opening : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"}) {
      if (take(opening)) {
        out_ += opening;
        caseless_.push_back(caseless || opening == "(?i:");
        atom_ = false;
        folded_.clear();
        return;
      }
    }
    take("(");
    if (!rest_.empty() && (rest_[0] == '?' || rest_[0] == '*')) {
      refuse(fmt::format("({}", rest_.substr(0, std::min<std::size_t>(rest_.size(), 3))));
    }
    out_ += "(?:";  // groups are for structure only: back-references are refused
    caseless_.push_back(caseless);
    atom_ = false;
    folded_.clear();
  }

  void quantifier() {
    if (!atom_) {
      refuse(rest_.substr(0, 1));
    }
    atom_ = false;
    folded_.clear();
    if (rest_[0] != '{') {
      out_ += rest_[0];
      rest_.remove_prefix(1);
      if (!rest_.empty() && (rest_[0] == '?' || rest_[0] == '+')) {
        out_ += rest_[0];
        rest_.remove_prefix(1);
      }
      return;
    }
    const std::size_t end = rest_.find('}');
    const std::string_view interval = rest_.substr(0, end == std::string_view::npos ? 1 : end + 1);
    std::string_view bounds = interval.substr(1, interval.size() - std::min<std::size_t>(interval.size(), 2));
    const auto digits = [&bounds] {
      const std::size_t n = std::min(bounds.find_first_not_of("0123456789"), bounds.size());
      const std::string_view number = bounds.substr(0, n);
      bounds.remove_prefix(n);
      return number;
    };
    const std::string_view low = digits();
    const bool comma = bounds.starts_with(',');
    bounds.remove_prefix(comma ? 1 : 0);
    const std::string_view high = comma ? digits() : std::string_view();
    if (end == std::string_view::npos || !bounds.empty() || (low.empty() && high.empty())) {
      refuse(interval);
    }
    rest_.remove_prefix(interval.size());
    if (!rest_.empty() && (rest_[0] == '?' || rest_[0] == '+' || rest_[0] == '*' || rest_[0] == '{')) {
      refuse(fmt::format("{}{}", interval, rest_[0]));  // {n}+ and {n}? mean other things in Ruby's syntax
    }
    out_ += fmt::format("{{{}{}{}}}", low.empty() ? "0" : low, comma ? "," : "", high);
  }

  void char_class() {
    not_caseless("[");
    take("[");
    out_ += take("^") ? "[^" : "[";
    if (rest_.starts_with("]")) {
      refuse("[]");
    }
    while (!take("]")) {
      if (rest_.empty()) {
        refuse("[ without ]");
      }
      if (rest_[0] == '[' || rest_.starts_with("&&")) {
        refuse(rest_[0] == '[' ? "[ inside of a class" : "&&");
      }
      if (rest_[0] == '\\') {
        class_escape();
      } else {
        out_ += take_character();
      }
    }
    out_ += ']';
    atom_ = true;
  }

  // The general category after \p or \P.
  std::string_view category(std::string_view escape) {
    const std::size_t end = rest_.starts_with('{') ? rest_.find('}') : std::string_view::npos;
    if (end == std::string_view::npos) {
      refuse(escape);
    }
    const std::string_view name = rest_.substr(1, end - 1);
    if (std::find(kCategories.begin(), kCategories.end(), name) == kCategories.end()) {
      refuse(fmt::format("{}{{{}}}", escape, name));
    }
    rest_.remove_prefix(end + 1);
    return name;
  }

  // Outside of a class.
  void escape() {
    std::string items;
    if (take(R"(\p)")) {
      items = category_items(category(R"(\p)"));
    } else if (take(R"(\P)")) {
      items = "^" + category_items(category(R"(\P)"));
    } else if (take(R"(\s)")) {
      items = kSpaceItems;
    } else if (take(R"(\S)")) {
      items = fmt::format("^{}", kSpaceItems);
    } else if (take(R"(\d)")) {
      items = category_items("Nd");
    } else if (take(R"(\D)")) {
      items = "^" + category_items("Nd");
    } else {
      const std::string character = escaped_character();
      literal(character, character);
      return;
    }
    not_caseless("\\p, \\s or \\d");
    out_ += "[" + items + "]";
    atom_ = true;
  }

  void class_escape() {
    if (take(R"(\p)")) {
      out_ += category_items(category(R"(\p)"));
    } else if (take(R"(\s)")) {
      out_ += kSpaceItems;
    } else if (take(R"(\d)")) {
      out_ += category_items("Nd");
    } else {
      out_ += escaped_character();
    }
  }

  // A control character or an escaped sign, the same in both engines.
  std::string escaped_character() {
    take("\\");
    const std::string_view character = take_character();
    if (character.size() != 1 ||
        std::string_view(R"(rntf.-/\[](){}|*+?^$'"`~!@#%&=:;,<> _)").find(character) == std::string_view::npos) {
      refuse(fmt::format("\\{}", character));
    }
    return fmt::format("\\{}", character);
  }

  void literal(std::string_view character, std::string_view written) {
    if (caseless_.back()) {
      if (character.size() == 1 && ((character[0] | 0x20) >= 'a' && (character[0] | 0x20) <= 'z')) {
        folded_ += static_cast<char>(character[0] | 0x20);
      } else if (static_cast<unsigned char>(character[0]) >= 0x80) {
        refuse("a letter beyond ASCII inside of (?i:");
      } else {
        folded_.clear();
      }
      for (const std::string_view ligature : {"ss", "st", "ff", "fi", "fl"}) {
        if (folded_.ends_with(ligature)) {
          refuse(fmt::format("(?i:{}", ligature));  // matches one character, such as U+00DF, in Oniguruma alone
        }
      }
    }
    out_ += written;
    atom_ = true;
  }

  void not_caseless(std::string_view what) const {
    if (caseless_.back()) {
      refuse(fmt::format("{} inside of (?i:", what));
    }
  }

  std::string_view rest_;
  std::string out_;
  std::vector<bool> caseless_ = {false};  // of each open group
  std::string folded_;                    // the latest letters of a literal inside of (?i:
  bool atom_ = false;                     // a quantifier may follow
};

template <auto release>
struct Release {
  template <class T>
  void operator()(T* object) const {
    release(object);
  }
};
template <class T, auto release>
using Owned = std::unique_ptr<T, Release<release>>;

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

}  // namespace

struct Regex::Code {
  Owned<pcre2_code, pcre2_code_free> code;
};

Regex::Regex(std::string_view pattern) : code_(std::make_unique<Code>()) {
  const std::string written = Translation(pattern).run();
  const Owned<pcre2_compile_context, pcre2_compile_context_free> context(pcre2_compile_context_create(nullptr));
  if (!context) {
    throw std::bad_alloc();
  }
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE offset = 0;
  code_->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(written.data()), written.size(), PCRE2_UTF | PCRE2_UCP,
                                  &error, &offset, context.get()));
  if (!code_->code) {
    throw std::invalid_argument(fmt::format("the regular expression does not compile: {}", message_of(error)));
  }
  pcre2_jit_compile(code_->code.get(), PCRE2_JIT_COMPLETE);  // where it cannot, PCRE2 interprets
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

std::vector<Range> Regex::matches(std::string_view text) const {
  constexpr std::size_t kFirstStack = std::size_t{32} << 10, kLargestStack = std::size_t{64} << 20;
  const Owned<pcre2_match_data, pcre2_match_data_free> match(pcre2_match_data_create(1, nullptr));
  const Owned<pcre2_match_context, pcre2_match_context_free> context(pcre2_match_context_create(nullptr));
  const Owned<pcre2_jit_stack, pcre2_jit_stack_free> stack(pcre2_jit_stack_create(kFirstStack, kLargestStack, nullptr));
  if (!match || !context) {
    throw std::bad_alloc();
  }
  pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
  // Enough for any expression that looks at each character a few times; one that goes back and forth is cut off here.
  constexpr std::size_t kSteps = 20'000'000, kStepsPerByte = 64;
  constexpr std::uint32_t kHeapKiB = std::uint32_t{1} << 20;
  pcre2_set_match_limit(context.get(),
                        static_cast<std::uint32_t>(std::min<std::size_t>(kSteps + kStepsPerByte * text.size(),
                                                                         std::numeric_limits<std::uint32_t>::max())));
  pcre2_set_heap_limit(context.get(), kHeapKiB);
  const PCRE2_SIZE* const found = pcre2_get_ovector_pointer(match.get());

  std::vector<Range> ranges;
  std::size_t from = 0;
  while (from <= text.size()) {
    const auto search = [&](std::uint32_t options) {
      return pcre2_match(code_->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                         PCRE2_NO_UTF_CHECK | options, match.get(), context.get());
    };
    int result = search(0);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) {
      result = search(PCRE2_NO_JIT);
    }
    if (result == PCRE2_ERROR_NOMATCH) {
      break;
    }
    if (result < 0) {
      throw ConfigError(
          fmt::format("the text cannot be split into words behind byte {} ({}); pass token ids with --tokens instead",
                      from, message_of(result)));
    }
    if (found[0] == found[1] && !ranges.empty() && ranges.back().end == found[1]) {
      // Nothing, right behind the last match: go on one character further.
      from += std::max<std::size_t>(1, character_size(text.substr(from)));
      continue;
    }
    ranges.push_back({found[0], found[1]});
    from = found[1];
  }
  return ranges;
}

std::string category_items(std::string_view category) {
  std::string items = fmt::format("\\p{{{}}}", category);
  for (const CodePoints& added : added_code_points(category)) {
    items += fmt::format("\\x{{{:x}}}-\\x{{{:x}}}", static_cast<std::uint32_t>(added.first),
                         static_cast<std::uint32_t>(added.last));
  }
  return items;
}

}  // namespace kvreplay::text
