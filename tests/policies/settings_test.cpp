#include "policies/settings.hpp"

#include <algorithm>
#include <catch2/catch.hpp>

#include "policies/catalogue.hpp"
#include "policies/values.hpp"

using namespace kvreplay;

namespace {

std::string set(const std::string& method, const std::vector<std::pair<std::string, std::string>>& settings) {
  const auto params = params_of(method);
  std::vector<std::pair<MethodParam, std::string>> found;
  for (const auto& [name, value] : settings) {
    found.emplace_back(param_named(params, method, name), value);
  }
  return with_settings(method, found);
}

std::string value_of(const std::string& method, const std::string& name) {
  const MethodParam p = param_named(params_of(method), method, name);
  return format_value(*p.param, p.value);
}

void refuses(const std::string& method, const std::string& name, const std::vector<std::string>& words) {
  try {
    param_named(params_of(method), method, name);
    FAIL("was accepted");
  } catch (const ConfigError& e) {
    INFO(e.what());
    for (const std::string& word : words) {
      CHECK(std::string(e.what()).find(word) != std::string::npos);
    }
  }
}

}  // namespace

TEST_CASE("a method's parameters have the values that the method gives them") {
  CHECK(value_of("moment-kv", "alpha") == "0.97");
  CHECK(value_of("moment-kv", "scope") == "layer");
  CHECK(value_of("h2o:window=8+adakv", "window") == "8");
  CHECK(value_of("h2o", "window") == "50%");
  CHECK(value_of("momentkv", "adakv.alpha") == "0.2");
  CHECK(value_of("snapkv-official", "pooling") == "max");
  CHECK(value_of("snapkv:budget=64,kernel=3/h2o:scope=query_head", "kernel") == "3");
  CHECK(value_of("snapkv:budget=64/h2o:scope=query_head", "scope") == "query_head");
  CHECK(value_of("snapkv:budget=64/h2o:scope=query_head", "prefill.scope") == "kv_head");
  CHECK(value_of("snapkv+pyramid:window=9/h2o+pyramid:window=5", "prefill.pyramid.window") == "9");
  CHECK(value_of("snapkv+pyramid:window=9/h2o+pyramid:window=5", "pyramid.window") == "5");
  CHECK(value_of("snapkv:budget=64/h2o", "pool") == "decode");
}

TEST_CASE("setting a parameter changes it and nothing else") {
  CHECK(set("moment-kv", {{"alpha", "0.5"}}) == "moment-kv:alpha=0.5");
  CHECK(set(" moment-kv:alpha=0.9 ", {{"alpha", "0.5"}}) == "moment-kv:alpha=0.5");
  CHECK(set("h2o:sink=4,window=8+adakv", {{"sink", "2"}, {"alpha", "0.3"}}) == "h2o:sink=2,window=8+adakv:alpha=0.3");
  CHECK(set("momentkv:residual.window=4", {{"window", "9"}, {"safeguard", "official"}}) ==
        "momentkv:window=9,safeguard=official");
  CHECK(set("momentkv:window=4,residual.window=5", {{"window", "9"}}) == "momentkv:window=9");
  CHECK(set("h2o", {{"interval", "4"}}) == "h2o:interval=4");
  CHECK(set("snapkv:budget=2048/momentum:alpha=0.97", {{"kernel", "3"}, {"alpha", "@a.json"}}) ==
        "snapkv:budget=2048,kernel=3/momentum:alpha=@a.json");
  CHECK(set("h2o:budget=64/h2o", {{"window", "3"}, {"prefill.window", "5"}}) == "h2o:budget=64,window=5/h2o:window=3");
  CHECK(set("snapkv:budget=64+adakv/h2o", {{"alpha", "0.5"}}) == "snapkv:budget=64+adakv:alpha=0.5/h2o");
}

TEST_CASE("a name that is none, or that several parts have, is refused") {
  refuses("moment-kv", "alhpa", {"'alhpa'", "'alpha'", "scope"});
  refuses("residual+kivi", "residual.x", {"'residual.x'"});
  refuses("h2o", "budget", {"'budget'"});
}

TEST_CASE("every parameter of every part and preset can be found and set to the value that it has") {
  std::vector<std::string> methods;
  for (const PartInfo* part : all_parts()) {
    const std::string name(part->name);
    if (part->name == "given" || part->name == "whitelist") {
      continue;  // need one of their texts
    }
    methods.push_back(part->role == Role::select ? name
                      : part->across_heads       ? "full:scope=layer+" + name
                      : part->role == Role::read ? "full+" + name
                                                 : "h2o+" + name);
  }
  for (const Preset& p : all_presets()) {
    methods.emplace_back(p.name);
  }
  for (const std::string& method : methods) {
    INFO(method);
    const auto params = params_of(method);
    for (const MethodParam& p : params) {
      INFO(p.name);
      CHECK(&param_named(params, method, p.name) == &p);
      if (p.param->type == ParamType::file && p.value.text.empty()) {
        continue;  // no text says "none"
      }
      const std::string text = with_settings(method, {{p, format_value(*p.param, p.value)}});
      CHECK(parse_method(text).name == parse_method(method).name);
    }
  }
}
