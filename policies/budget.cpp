// What "128", "0.25", "25%" and "64KiB" ask a set to keep.
#include <algorithm>
#include <cmath>

#include "policies/method.hpp"
#include "policies/values.hpp"

namespace kvreplay {
namespace {

struct Suffix {
  std::string_view text;
  double factor;
};
constexpr Suffix kSuffixes[] = {{"KiB", 1024}, {"MiB", 1024 * 1024}, {"B", 1}};  // "B" last: all end so

[[noreturn]] void refuse(const std::string& text, const std::string& why) {
  throw ConfigError("budget '" + text + "' " + why +
                    "; a budget is tokens (128), a fraction of the prompt (0.25 or 25%) or bytes per "
                    "KV head (65536B, 64KiB, 1MiB)");
}

}  // namespace

Budget Budget::parse(const std::string& text) {
  Budget b;
  b.text = text;
  std::string_view number = text;
  double factor = 1;
  const auto take = [&](std::string_view suffix) {
    if (number.size() <= suffix.size() || !number.ends_with(suffix)) {
      return false;
    }
    number.remove_suffix(suffix.size());
    return true;
  };
  b.unit = text.find('.') != std::string::npos ? Unit::fraction : Unit::tokens;
  if (take("%")) {
    b.unit = Unit::fraction;
    factor = 0.01;
  } else {
    for (const Suffix& s : kSuffixes) {
      if (take(s.text)) {
        b.unit = Unit::bytes;
        factor = s.factor;
        break;
      }
    }
  }
  if (!parse_number(number, b.value)) {
    refuse(text, "is not a number");
  }
  b.value *= factor;
  if (b.unit == Unit::tokens && (b.value < 1 || b.value != std::floor(b.value))) {
    refuse(text, b.value < 1 ? "is less than one token" : "is not a whole number of tokens");
  }
  if (b.unit == Unit::tokens && b.value > kUnbounded) {
    refuse(text, "is more than any trace holds");
  }
  if (b.unit == Unit::fraction && !(b.value > 0 && b.value <= 1)) {
    refuse(text, "is not a fraction above 0 and up to 1");
  }
  if (b.unit == Unit::bytes && b.value < 1) {
    refuse(text, "is less than one byte");
  }
  return b;
}

int Budget::tokens(Pos prompt_len, double slot_bytes, const std::function<double(int)>& state_bytes,
                   int sets_per_kv_head) const {
  constexpr double kRound = 1e-9;  // 0.29 of 100 is 29 tokens
  switch (unit) {
    case Unit::none:
      return 0;
    case Unit::tokens:
      return static_cast<int>(value);
    case Unit::fraction:
      return std::max(1, static_cast<int>(std::floor(value * prompt_len + kRound)));
    case Unit::bytes:
      break;
  }
  const double one = slot_bytes * sets_per_kv_head;
  const auto state = [&](int n) { return state_bytes ? sets_per_kv_head * state_bytes(n) : 0; };
  const auto fits = [&](int n) { return n * one + state(n) <= value + kRound * one; };
  if (!fits(1)) {
    throw ConfigError("budget '" + text + "' does not hold one token: at least " +
                      format_number(std::ceil(one + state(1))) + " bytes per KV head are needed (" +
                      format_number(one) + " for a token's key and value" +
                      (sets_per_kv_head > 1 ? " in each query head's set" : "") +
                      (state(1) > 0 ? ", " + format_number(state(1)) + " for what the method keeps beside" : "") + ")");
  }
  int n = 1, too_many = static_cast<int>(std::min(value / one + 2, kUnbounded));
  while (too_many - n > 1) {
    const int middle = n + (too_many - n) / 2;
    (fits(middle) ? n : too_many) = middle;
  }
  return n;
}

}  // namespace kvreplay
