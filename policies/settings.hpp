// The parameters that a method as a whole has, and its text with some of them set.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "policies/method.hpp"

namespace kvreplay {

// One parameter of one part of a method, with the value that the method gives it.
struct MethodParam {
  std::string name;  // how it is written: "alpha"; "adakv.alpha" where two parts have one; "prefill.window"
  const PartInfo* part = nullptr;
  const ParamInfo* param = nullptr;
  bool engine = false;   // an engine key of the selector
  bool prefill = false;  // of what is before the "/"
  ParamValue value;
  bool table = false;                // the method has a table instead of one value
  std::size_t phase = 0, piece = 0;  // where in the text
};

// Every parameter of the method's parts and its selector's engine keys, in the order of the text. ConfigError as
// parse_method.
std::vector<MethodParam> params_of(const std::string& method, const TableReader& read_table = {});

// By KEY, PART.KEY or prefill.KEY; a key of both halves means that of the decode tokens. ConfigError names the
// nearest, or what to write where several parts have it.
const MethodParam& param_named(const std::vector<MethodParam>& params, const std::string& method,
                               const std::string& name);

// The method's text with these parameters set, each written where the method had it or at its part's end.
std::string with_settings(const std::string& method, const std::vector<std::pair<MethodParam, std::string>>& settings);

}  // namespace kvreplay
