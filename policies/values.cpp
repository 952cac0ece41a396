#include "policies/values.hpp"

#include <charconv>
#include <vector>

#include "policies/catalogue.hpp"
#include "policies/errors.hpp"

namespace kvreplay {
namespace {

// `shown` is the value as the user wrote it.
void check_bounds(const std::string& owner, const ParamInfo& p, const ParamValue& v, const std::string& shown) {
  const std::string key = owner + ": " + std::string(p.name) + "=" + shown;
  if (!std::isfinite(v.number)) {
    throw ConfigError(key + " is not a finite number");
  }
  const bool whole = p.type == ParamType::integer || (p.type == ParamType::tokens && !v.percent);
  if (whole && v.number != std::floor(v.number)) {
    throw ConfigError(key + " is not a whole number (" + allowed(p) + ")");
  }
  const double lo = v.percent ? 0 : p.lo, hi = v.percent ? 100 : p.hi;
  if (v.number < lo || v.number > hi) {
    throw ConfigError(key + " is out of range: it must be " + allowed(p));
  }
}

ParamValue parse_choice(const std::string& owner, const ParamInfo& p, const std::string& text) {
  const std::vector<std::string> names(p.choices.begin(), p.choices.end());
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (names[i] == text) {
      return {static_cast<double>(i), false, {}};
    }
  }
  throw ConfigError(owner + ": " + std::string(p.name) + "=" + text + " is not " + allowed(p) + "; the nearest is '" +
                    nearest(text, names) + "'");
}

}  // namespace

bool parse_number(std::string_view text, double& out) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, out);
  return error == std::errc() && stop == end && std::isfinite(out);
}

std::string format_number(double x) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, x).ptr};
}

std::string allowed(const ParamInfo& p) {
  switch (p.type) {
    case ParamType::boolean:
      return "true or false";
    case ParamType::file:
      return "a name or a path";
    case ParamType::choice: {
      std::string all;
      for (std::size_t i = 0; i < p.choices.size(); ++i) {
        all += i == 0 ? "" : i + 1 == p.choices.size() ? " or " : ", ";
        all += p.choices[i];
      }
      return all;
    }
    default:
      break;
  }
  std::string text =
      p.hi >= kUnbounded ? "at least " + format_number(p.lo) : format_number(p.lo) + " to " + format_number(p.hi);
  if (p.type == ParamType::tokens) {
    text += " tokens, or 0% to 100% of the budget";
  }
  return text;
}

ParamValue checked_value(const std::string& owner, const ParamInfo& p, double number) {
  ParamValue v{number, false, {}};
  check_bounds(owner, p, v, format_number(number));
  return v;
}

ParamValue parse_value(const std::string& owner, const ParamInfo& p, const std::string& text) {
  const std::string key = owner + ": " + std::string(p.name);
  if (text.empty()) {
    throw ConfigError(key + " has no value; it takes " + allowed(p));
  }
  if (p.type == ParamType::file) {
    return {0, false, text};
  }
  if (p.type == ParamType::choice) {
    return parse_choice(owner, p, text);
  }
  if (p.type == ParamType::boolean) {
    if (text == "true" || text == "1") {
      return {1, false, {}};
    }
    if (text == "false" || text == "0") {
      return {0, false, {}};
    }
    throw ConfigError(key + "=" + text + " is not true or false");
  }
  ParamValue v;
  v.percent = p.type == ParamType::tokens && text.back() == '%';
  if (!parse_number(std::string_view(text).substr(0, text.size() - (v.percent ? 1 : 0)), v.number)) {
    throw ConfigError(key + "=" + text + " is not a number; it takes " + allowed(p));
  }
  check_bounds(owner, p, v, text);
  return v;
}

std::string format_value(const ParamInfo& p, const ParamValue& v) {
  switch (p.type) {
    case ParamType::boolean:
      return v.number != 0 ? "true" : "false";
    case ParamType::file:
      return v.text;
    case ParamType::choice:
      return std::string(p.choices[static_cast<std::size_t>(v.number)]);
    default:
      return format_number(v.number) + (v.percent ? "%" : "");
  }
}

bool equal(const ParamValue& a, const ParamValue& b) {
  return a.number == b.number && a.percent == b.percent && a.text == b.text;
}

}  // namespace kvreplay
