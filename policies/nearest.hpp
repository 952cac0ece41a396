// The valid name closest to what was written, for error messages.
#pragma once
#include <span>
#include <string>
#include <string_view>

namespace kvreplay {

std::string nearest(std::string_view name, std::span<const std::string> valid);

}  // namespace kvreplay
