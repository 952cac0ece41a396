// Code points that Unicode 15.0 to 16.0 added. Hugging Face's tokenizers splits text by the categories of Unicode 16.0;
// PCRE2 10.42 (Debian 12) knows those of 14.0, so these are named to it one by one. With a newer PCRE2 they change
// nothing.
#pragma once
#include <string_view>
#include <vector>

namespace kvreplay::text {

struct CodePoints {
  char32_t first, last;  // both included
};

// category: "L", "Nd" and so on; ascending.
std::vector<CodePoints> added_code_points(std::string_view category);

}  // namespace kvreplay::text
