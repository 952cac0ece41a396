// A part's knobs, declared once beside the part. From this table come parsing, validation, help, tuner and documents.
#pragma once
#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "policies/policy.hpp"

namespace kvreplay {

// A number of tokens, or a percentage of the budget (floor).
struct Tokens {
  double value = 0;
  bool percent = false;
  int of(int budget) const { return static_cast<int>(percent ? std::floor(value * budget / 100 + 1e-9) : value); }
};

enum class ParamType { integer, real, boolean, choice, file, tokens };
enum class Scale { lin, log, one_minus };  // one_minus: decays; log of 1 - x

// One value, as text says it, checked against its ParamInfo. `number` holds integer, real, boolean and choice index.
struct ParamValue {
  double number = 0;
  bool percent = false;
  std::string text;  // file
};

struct ParamInfo {
  std::string_view name;
  ParamType type;
  double lo, hi;
  Scale scale;
  std::span<const std::string_view> choices;
  std::string_view doc;
  ParamValue (*get)(const void* config);
  void (*set)(void* config, const ParamValue&);
};

namespace detail {
template <class Config, class T>
Config owner_of(T Config::*);
template <class Config, class T>
T type_of(T Config::*);

template <auto Member>
struct Access {
  using Config = decltype(owner_of(Member));
  using T = decltype(type_of(Member));
  static ParamValue get(const void* config) {
    const T& x = static_cast<const Config*>(config)->*Member;
    if constexpr (std::is_same_v<T, Tokens>) {
      return {x.value, x.percent, {}};
    } else if constexpr (std::is_same_v<T, std::string>) {
      return {0, false, x};
    } else {
      return {static_cast<double>(x), false, {}};
    }
  }
  static void set(void* config, const ParamValue& v) {
    T& x = static_cast<Config*>(config)->*Member;
    if constexpr (std::is_same_v<T, Tokens>) {
      x = {v.number, v.percent};
    } else if constexpr (std::is_same_v<T, std::string>) {
      x = v.text;
    } else {
      x = static_cast<T>(v.number);
    }
  }
};
}  // namespace detail

// The kinds of knob. Bounds are inclusive.
template <auto Member>
constexpr ParamInfo number(std::string_view name, double lo, double hi, std::string_view doc,
                           Scale scale = Scale::lin) {
  using A = detail::Access<Member>;
  constexpr ParamType type = std::is_same_v<typename A::T, Tokens> ? ParamType::tokens
                             : std::is_same_v<typename A::T, bool> ? ParamType::boolean
                             : std::is_integral_v<typename A::T>   ? ParamType::integer
                                                                   : ParamType::real;
  return {name, type, lo, hi, scale, {}, doc, &A::get, &A::set};
}
template <auto Member>
constexpr ParamInfo flag(std::string_view name, std::string_view doc) {
  return number<Member>(name, 0, 1, doc);
}
template <auto Member>
constexpr ParamInfo choice(std::string_view name, std::span<const std::string_view> choices, std::string_view doc) {
  using A = detail::Access<Member>;
  return {name, ParamType::choice, 0, 0, Scale::lin, choices, doc, &A::get, &A::set};
}
template <auto Member>
constexpr ParamInfo text(std::string_view name, std::string_view doc) {
  using A = detail::Access<Member>;
  return {name, ParamType::file, 0, 0, Scale::lin, {}, doc, &A::get, &A::set};
}
inline constexpr double kUnbounded = std::numeric_limits<int>::max();

}  // namespace kvreplay
