#include "policies/catalogue.hpp"

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "policies/help.hpp"

using namespace kvreplay;
namespace fs = std::filesystem;

TEST_CASE("one file per part: stems, folders and catalogue agree") {
  std::set<std::string> listed, found;
  for (const PartInfo* p : all_parts()) {
    const std::string entry = std::string(role_name(p->role)) + "/" + std::string(p->name);
    CHECK(listed.insert(entry).second);
  }
  for (const char* role : {"select", "read", "allocate", "rewrite", "compensate"}) {
    for (const auto& file : fs::directory_iterator(fs::path(KVREPLAY_ROOT) / "policies" / role)) {
      if (file.path().extension() == ".cpp") {
        found.insert((fs::path(role) / file.path().stem()).string());
      }
    }
  }
  CHECK(listed == found);
}

TEST_CASE("names are unique and keys of a part do not hide engine keys") {
  std::set<std::string_view> names;
  for (const PartInfo* p : all_parts()) {
    INFO(p->name);
    CHECK(names.insert(p->name).second);
    CHECK(find_part(p->name) == p);
    CHECK_FALSE(p->summary.empty());
    std::set<std::string_view> keys;
    if (p->role == Role::select) {
      keys.insert("budget");
      for (const ParamInfo& k : engine_keys()) {
        keys.insert(k.name);
      }
    }
    const auto config = p->config();
    for (const ParamInfo& k : p->params) {
      INFO(k.name);
      CHECK(keys.insert(k.name).second);
      CHECK_FALSE(k.doc.empty());
      const ParamValue v = k.get(config.get());
      if (k.type == ParamType::choice) {
        CHECK(v.number < static_cast<double>(k.choices.size()));
      } else if (!v.percent) {
        CHECK(v.number >= k.lo);
        CHECK(v.number <= k.hi);
      }
    }
  }
  for (const Preset& p : all_presets()) {
    CHECK(names.insert(p.name).second);
  }
}

TEST_CASE("the two MomentKVs name each other") {
  CHECK(help_text("momentkv").find("moment-kv") != std::string::npos);
  CHECK(help_text("moment-kv").find("momentkv") != std::string::npos);
  CHECK(help_text("momentum").find("half-life 22.8 steps") != std::string::npos);
  CHECK_THROWS_WITH(help_text("momentun"), Catch::Contains("'momentum'"));
}

TEST_CASE("the tables of docs/methods.md are those of the catalogue") {
  std::ifstream file(fs::path(KVREPLAY_ROOT) / "docs" / "methods.md");
  std::stringstream text;
  text << file.rdbuf();
  const std::string doc = text.str();
  const std::string begin = "<!-- begin: kvreplay policies --markdown -->\n", end = "<!-- end -->";
  const auto from = doc.find(begin), to = doc.find(end);
  REQUIRE(from != std::string::npos);
  REQUIRE(to != std::string::npos);
  INFO("write the output of `kvreplay policies --markdown` between the markers");
  CHECK(doc.substr(from + begin.size(), to - from - begin.size()) == markdown());
}
