// One value of one knob, from text and back.
#pragma once
#include <string>

#include "policies/params.hpp"

namespace kvreplay {

// ConfigError names `owner`, the key, the text and what is allowed.
ParamValue parse_value(const std::string& owner, const ParamInfo& param, const std::string& text);
// A number that did not come as text, such as an entry of a table.
ParamValue checked_value(const std::string& owner, const ParamInfo& param, double number);

// The shortest text that parses to the same value.
std::string format_value(const ParamInfo& param, const ParamValue& value);
std::string format_number(double x);

// "0 to 4096", "at least 1", "kv_head, layer or query_head".
std::string allowed(const ParamInfo& param);

bool equal(const ParamValue& a, const ParamValue& b);

// The whole text as a finite number; false if it is none.
bool parse_number(std::string_view text, double& out);

}  // namespace kvreplay
