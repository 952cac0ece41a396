#include "policies/method.hpp"

#include <catch2/catch.hpp>
#include <limits>

#include "policies/catalogue.hpp"
#include "policies/values.hpp"

using namespace kvreplay;
using Catch::Matchers::Contains;

namespace {

std::string name_of(const std::string& text) { return parse_method(text).name; }

void refuses(const std::string& text, const std::vector<std::string>& words) {
  INFO("method " << text);
  try {
    parse_method(text);
    FAIL("was accepted");
  } catch (const ConfigError& e) {
    const std::string what = e.what();
    INFO(what);
    CHECK(what.find('\n') == std::string::npos);
    for (const std::string& word : words) {
      CHECK(what.find(word) != std::string::npos);
    }
  }
}

}  // namespace

TEST_CASE("a method's name is canonical: presets expanded, defaults omitted, keys in table order") {
  CHECK(name_of("h2o") == "h2o");
  CHECK(name_of(" h2o ") == "h2o");
  CHECK(name_of("h2o:window=50%,sink=0,scope=kv_head") == "h2o");
  CHECK(name_of("h2o:scope=layer,window=128,sink=4") == "h2o:sink=4,window=128,scope=layer");
  CHECK(name_of("h2o:interval=1e3") == "h2o:interval=1000");
  CHECK(name_of("h2o+moments+adakv") == "h2o+adakv+moments");
  CHECK(name_of("momentkv") == "residual+adakv+moments");
  CHECK(name_of("momentkv:window=0,alpha=0.1") == "residual:window=0+adakv:alpha=0.1+moments");
  CHECK(name_of("momentkv:residual.sink=2") == "residual:sink=2+adakv+moments");
  CHECK(name_of("moment-kv:alpha=0.5") == "momentum:alpha=0.5");
  CHECK(name_of("snapkv-official:kernel=5") == "snapkv:obs_window=32,pooling=max");
  CHECK(name_of("oracle_topk:budget=20%") == "full+topk:budget=20%");
  CHECK(name_of("snapkv:budget=2048/momentum:alpha=0.9") == "snapkv:budget=2048/momentum:alpha=0.9");
  CHECK(name_of("snapkv:budget=25%,obs_window=16/tova") == "snapkv:obs_window=16,budget=0.25/tova");
  CHECK(name_of("snapkv:budget=64KiB/tova:pool=decode") == "snapkv:budget=65536B/tova");
  CHECK(name_of("snapkv:budget=64+adakv:alpha=0.20/tova") == "snapkv:budget=64+adakv/tova");
  CHECK(name_of("snapkv+pyramid:beta=10/tova+pyramid") == "snapkv+pyramid:beta=10/tova+pyramid");
  CHECK(name_of("snapkv+uniform/tova") == "snapkv/tova");
  CHECK(name_of("expected-attention:alpha=0.1,budget=30%/tova") ==
        "expected:epsilon=0.01,budget=0.3+adakv:alpha=0.1/tova");
  CHECK(name_of("given:evicted_at=runs/h2o.h5") == "given:evicted_at=runs/h2o.h5");
  CHECK(parse_method("momentkv").preset == "momentkv");
  CHECK(parse_method(" momentkv").label == "momentkv");
}

TEST_CASE("the selector after a slash owns the decode tokens") {
  const Method m = parse_method("snapkv:budget=64,scope=query_head/h2o:scope=query_head");
  REQUIRE(m.prefill_select);
  CHECK(m.prefill_budget.tokens(1000, 1, {}, 1) == 64);
  CHECK(m.prefill_traits.scope == Scope::query_head);
  CHECK(m.traits.pool == Pool::decode);
  CHECK(m.needs().prompt_queries == 64);  // the pinned prompt asks h2o for none
}

TEST_CASE("an allocator before the slash divides the prompt's budget") {
  const Method m = parse_method("snapkv:budget=64+whitelist:spans=system/h2o+pyramid");
  REQUIRE(m.prefill_allocate);
  CHECK(m.prefill_allocate->info->name == "whitelist");
  REQUIRE(m.allocate);
  CHECK(m.allocate->info->name == "pyramid");
  CHECK(m.parts().size() == 4);
  CHECK(m.needs().spans);
  // Its own check sees the prompt's budget.
  const Method own = parse_method("snapkv+surface_logic:b_min=9/h2o");
  CHECK_NOTHROW(own.check(3, 9));
  CHECK_THROWS_WITH(own.check(9, 3), Catch::Contains("b_min=9"));
}

TEST_CASE("what cannot be is refused in one sentence that names it, what is allowed and what is near") {
  refuses("", {"empty"});
  refuses("  ", {"empty"});
  refuses(std::string("\0h2o/h2o/h2o", 12), {"code 0"});
  refuses("h2p", {"'h2p'", "'h2o'"});
  refuses("h2o+adakw", {"'adakw'", "'adakv'"});
  refuses("h2o+", {"'h2o+'"});
  refuses("+h2o", {"no name"});
  refuses("h2o:windw=3", {"'windw'", "'window'", "scope"});
  refuses("full:x=1", {"'x'", "scope"});
  refuses("uniform", {"allocator", "selector"});
  refuses("quest", {"reader", "full+quest"});
  refuses("h2o+tova", {"'tova'", "'h2o'", "both selectors"});
  refuses("h2o+mean+moments", {"both compensators"});
  refuses("h2o+momentkv", {"whole method"});
  refuses("h2o:", {"key=value"});
  refuses("h2o:window", {"'window'", "key=value"});
  refuses("h2o:window=", {"window", "no value"});
  refuses("h2o:window=1.5", {"window=1.5", "whole number"});
  refuses("h2o:window=nan", {"window=nan", "not a number"});
  refuses("h2o:window=inf", {"window=inf", "not a number"});
  refuses("h2o:window=12x", {"window=12x", "not a number"});
  refuses("h2o:window=-1", {"window=-1", "at least 0"});
  refuses("h2o:window=101%", {"window=101%", "100%"});
  refuses("h2o:window=3,window=4", {"'window'", "twice"});
  refuses("h2o:scope=laier", {"scope=laier", "kv_head, layer or query_head", "'layer'"});
  refuses("h2o:interval=0", {"interval=0", "at least 1"});
  refuses("momentum:alpha=1.01", {"alpha=1.01", "0 to 1"});
  refuses("tova:pin_newest=yes", {"pin_newest=yes", "true or false"});
  refuses("snapkv:kernel=4", {"kernel=4", "odd"});
  refuses("h2o+kivi:residual=100", {"residual=100", "group=32"});
  refuses("given", {"scores", "evicted_at", "neither"});
  refuses("given:scores=a,evicted_at=b", {"both"});
  refuses("h2o:budget=3", {"budget", "before a '/'"});
  refuses("h2o:budget=3/momentun", {"'momentun'", "'momentum'"});
  refuses("h2o/momentun", {"'momentun'", "'momentum'"});
  refuses("h2o/tova/tova", {"at most one '/'"});
  refuses("full+quest/tova", {"reader 'quest'", "before the '/'"});
  refuses("h2o+d2o/tova", {"rewriter 'd2o'", "before the '/'"});
  refuses("momentkv/tova", {"compensator 'moments'", "before the '/'"});
  refuses("tova+adakv/h2o", {"'adakv'", "scope=layer", "'tova'"});
  refuses("h2o+adakv:budget=3/tova", {"'budget'", "prompt's selector alone"});
  refuses("h2o+adakv+pyramid/tova", {"both allocators"});
  refuses("snapkv/h2o+adakv", {"'adakv'", "pinned", "before the '/'"});
  refuses("h2o:scope=query_head/tova", {"scope=query_head at 'tova'"});
  refuses("full/tova", {"'full'", "whole prompt"});
  refuses("momentum/tova", {"'momentum'", "whole prompt"});
  refuses("h2o/tova:pool=all", {"pool=all"});
  refuses("h2o:interval=2/tova", {"'interval'", "scope and group"});
  refuses("h2o:budget=3,budget=4/tova", {"budget", "twice"});
  refuses("tova+adakv", {"'adakv'", "scope=layer"});
  refuses("h2o:pool=decode+adakv", {"'adakv'", "pinned"});
  refuses("momentum+quest", {"'quest'", "pinned"});
  refuses("full+adakv", {"'adakv'", "no budget"});
  refuses("h2o:pool=decode,decode=grow", {"decode=grow"});
  refuses("h2o:window=@a.json", {"cannot be read"});
}

TEST_CASE("allowed combinations are not refused") {
  for (const char* text : {"tova+pyramid", "h2o:pool=decode+kivi", "full+quest", "h2o:scope=query_head+adakv",
                           "full+kivi", "snapkv/full", "momentum:pool=all,scope=kv_head+adakv", "h2o+uniform"}) {
    INFO(text);
    CHECK_NOTHROW(parse_method(text));
  }
}

TEST_CASE("parts that say what happens anyway are left out like any default") {
  CHECK(parse_method("h2o+uniform+none").name == parse_method("h2o").name);
  CHECK_FALSE(parse_method("h2o+none").compensate.has_value());
  CHECK_FALSE(parse_method("h2o+uniform").allocate.has_value());
  CHECK(parse_method("h2o+mean").compensate.has_value());
}

TEST_CASE("every part survives its own canonical text at the bounds of every key") {
  for (const PartInfo* part : all_parts()) {
    std::string first = part->role == Role::select ? "" : part->role == Role::read ? "full+" : "h2o+";
    if (part->across_heads) {
      first = "full:scope=layer+";
    }
    const auto check = [&](const ParamInfo& p, const ParamValue& v) {
      std::string text = first + std::string(part->name) + ":" + std::string(p.name) + "=" + format_value(p, v);
      INFO(text);
      try {
        const Method m = parse_method(text);
        CHECK(parse_method(m.name).name == m.name);
        CHECK(parse_method(m.name).needs().prompt_queries == m.needs().prompt_queries);
        const auto config = part->config();
        p.set(config.get(), v);
        if (!equal(p.get(config.get()), p.get(part->config().get()))) {
          CHECK(m.name == text);
        }
      } catch (const ConfigError& e) {  // only the part itself may refuse a bound, as a combination
        const auto config = part->config();
        p.set(config.get(), v);
        INFO(e.what());
        CHECK_THROWS_AS(part->check(config.get(), 1000), ConfigError);
      }
    };
    for (const ParamInfo& p : part->params) {
      switch (p.type) {
        case ParamType::choice:
          for (std::size_t i = 0; i < p.choices.size(); ++i) {
            check(p, {static_cast<double>(i), false, {}});
          }
          break;
        case ParamType::file:
          check(p, {0, false, "some/name.h5"});
          break;
        default:
          check(p, {p.lo, false, {}});
          check(p, {p.hi, false, {}});
          if (p.type == ParamType::tokens) {
            check(p, {37.5, true, {}});
          }
      }
    }
    if (part->role != Role::select || part->name == "given") {
      continue;
    }
    for (const ParamInfo& p : engine_keys()) {
      for (std::size_t i = 0; i < p.choices.size(); ++i) {
        const std::string text = std::string(part->name) + ":" + std::string(p.name) + "=" + std::string(p.choices[i]);
        INFO(text);
        Traits both = part->traits(part->config().get());
        p.set(&both, {static_cast<double>(i), false, {}});
        const bool pins = both.pool == Pool::decode && both.decode == Decode::grow;  // nothing would ever leave
        if (pins) {
          CHECK_THROWS_AS(parse_method(text), ConfigError);
        } else {
          const std::string name = name_of(text);
          CHECK(name_of(name) == name);
        }
      }
    }
  }
  for (const Preset& preset : all_presets()) {
    const std::string name = name_of(std::string(preset.name));
    CHECK(name == preset.expansion);
    CHECK(name_of(name) == name);
  }
}

TEST_CASE("a budget is tokens, a fraction of the prompt, or bytes") {
  const auto tokens = [](const char* text, int prompt = 1000, double slot = 512, double state = 0, int sets = 1) {
    return Budget::parse(text).tokens(
        prompt, slot, [state](int) { return state; }, sets);
  };
  CHECK(tokens("128") == 128);
  CHECK(tokens("0.25") == 250);
  CHECK(tokens("25%") == 250);
  CHECK(tokens("0.29", 100) == 29);
  CHECK(tokens("1%", 5) == 1);
  CHECK(tokens("1.0") == 1000);
  CHECK(tokens("64KiB") == 128);
  CHECK(tokens("65536B") == 128);
  CHECK(tokens("1MiB") == 2048);
  CHECK(tokens("0.5MiB") == 1024);
  CHECK(tokens("64KiB", 1000, 512, 513) == 126);
  CHECK(tokens("64KiB", 1000, 512, 0, 4) == 32);
  CHECK(tokens("65535B") == 127);
  CHECK(tokens("512B") == 1);
  CHECK(tokens("64KiB", 1000, 512, 512, 4) == 31);  // each of the four sets has a state
  CHECK(tokens("9e17B", 1000, 1) == std::numeric_limits<int>::max() - 1);
  CHECK_THROWS_WITH(tokens("100B", 1000, 512, 40), Contains("552 bytes") && Contains("100B"));
  // A state that grows with the set: a fifth as many entries of 1032 bytes each.
  const auto growing = [](const char* text) {
    const auto state = [](int n) {
      const int entries = n / 5;
      return 1032.0 * entries;
    };
    return Budget::parse(text).tokens(1000, 512, state, 1);
  };
  CHECK(growing("2048B") == 4);
  CHECK(growing("3591B") == 4);
  CHECK(growing("3592B") == 5);
  CHECK(growing("64KiB") == 91);  // 91 * 512 + 18 * 1032 = 65168
  for (const char* text : {"", "0", "-1", "0.0", "1.5", "150%", "x", "12q", "nan", "0B", "1e99", "%", "B"}) {
    INFO(text);
    CHECK_THROWS_AS(Budget::parse(text), ConfigError);
  }
}

TEST_CASE("written protection that exceeds the budget is refused, defaults shrink") {
  const auto check = [](const char* text, int budget, int prompt_budget = 0) {
    parse_method(text).check(budget, prompt_budget);
  };
  CHECK_NOTHROW(check("h2o", 1));
  CHECK_NOTHROW(check("streaming", 1));
  CHECK_NOTHROW(check("snapkv", 1));
  CHECK_NOTHROW(check("residual", 1));
  CHECK_NOTHROW(check("h2o:window=64", 64));
  CHECK_THROWS_WITH(check("h2o:window=65", 64), Contains("window=65") && Contains("64"));
  CHECK_THROWS_WITH(check("h2o:sink=4,window=62", 64), Contains("66"));
  CHECK_THROWS_AS(check("streaming:sink=5", 4), ConfigError);
  CHECK_THROWS_AS(check("snapkv:obs_window=32", 16), ConfigError);
  CHECK_NOTHROW(check("h2o:window=50%,sink=2", 4));
  CHECK_NOTHROW(check("snapkv:obs_window=32/h2o", 16, 64));
  CHECK_THROWS_AS(check("snapkv:obs_window=32/h2o", 64, 16), ConfigError);
}

TEST_CASE("a comma list of methods splits where a method begins") {
  using V = std::vector<std::string>;
  CHECK(split_methods("a,b:x=1,y=2,c") == V{"a", "b:x=1,y=2", "c"});
  CHECK(split_methods("full+quest:page=8,budget=64+kivi:bits=2,group=16,tova") ==
        V{"full+quest:page=8,budget=64+kivi:bits=2,group=16", "tova"});
  CHECK(split_methods("snapkv:budget=64,obs_window=8/momentum:alpha=0.9,h2o") ==
        V{"snapkv:budget=64,obs_window=8/momentum:alpha=0.9", "h2o"});
  CHECK(split_methods("h2o") == V{"h2o"});
}

TEST_CASE("a number may come per layer or per layer and KV head") {
  int reads = 0;
  const TableReader read = [&](const std::string& path) {
    ++reads;
    return ValueTable{path, "hash", {0, 5}, {{0.5}, {0.1, 0.2}}};
  };
  const Method m = parse_method("momentum:alpha=@dir/a.json", read);
  CHECK(reads == 1);
  CHECK(m.name == "momentum:alpha=@dir/a.json");
  const ParamInfo& alpha = *m.select.settings.at(0).param;
  CHECK(alpha.get(m.select.config(0, 1).get()).number == 0.5);
  CHECK(alpha.get(m.select.config(5, 1).get()).number == 0.2);
  CHECK_THROWS_WITH(m.select.config(3, 0), Contains("layer 3"));
  CHECK_THROWS_WITH(m.select.config(5, 2), Contains("KV head 2"));
  CHECK_THROWS_WITH(parse_method("h2o:window=@a.json", read), Contains("0.5") && Contains("whole"));
  CHECK_THROWS_AS(parse_method("h2o:interval=@a.json", read), ConfigError);
}
