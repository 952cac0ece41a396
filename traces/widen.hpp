// Element types of a trace, and their exact widening to float32 (and rounding from it), many values
// at a time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kvreplay {

enum class ElementType { f16, bf16, f32 };

constexpr std::size_t size_of(ElementType type) { return type == ElementType::f32 ? 4 : 2; }
std::string_view name_of(ElementType type);          // "f16", "bf16", "f32", as flags and info say it
ElementType element_type_of(std::string_view name);  // throws std::invalid_argument, naming what is allowed

// Widens out.size() little-endian elements. Exact; a NaN stays a NaN. False if any value is
// infinite or NaN: the check rides along with the load, so that it costs nothing.
bool widen(ElementType type, const std::byte* in, std::span<float> out);

// Rounds to nearest, ties to even; what is too large becomes infinite, a NaN stays a NaN.
void narrow(ElementType type, std::span<const float> in, std::byte* out);

}  // namespace kvreplay
