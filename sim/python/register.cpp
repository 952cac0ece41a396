// Selectors written in Python, as parts of the catalogue.
#include <fmt/format.h>
#include <pybind11/stl.h>

#include <array>
#include <variant>

#include "policies/catalogue.hpp"
#include "policies/values.hpp"
#include "sim/python/active_run.hpp"
#include "sim/python/bindings.hpp"
#include "sim/python/definition.hpp"

namespace kvreplay::python {
namespace {

constexpr std::size_t kMostSelectors = 64, kMostKeys = 32;

struct Place {
  std::shared_ptr<const Definition> definition;  // nullptr: free
  PartInfo part;
};
std::array<Place, kMostSelectors>& places() {
  static auto& all = *new std::array<Place, kMostSelectors>{};  // outlives Python
  return all;
}

// A part's functions hold no state. A Config does: so only the function that makes it is there once for each place.
template <std::size_t I>
std::shared_ptr<void> config_of() {
  const auto& of = places()[I].definition;
  return std::make_shared<Config>(Config{of, of->defaults});
}
template <std::size_t I>
ParamValue get_value(const void* config) {
  return static_cast<const Config*>(config)->values[I];
}
template <std::size_t I>
void set_value(void* config, const ParamValue& value) {
  static_cast<Config*>(config)->values[I] = value;
}
constexpr auto kConfigs = []<std::size_t... I>(std::index_sequence<I...>) { return std::array{&config_of<I>...}; }
(std::make_index_sequence<kMostSelectors>());
constexpr auto kGetters = []<std::size_t... I>(std::index_sequence<I...>) { return std::array{&get_value<I>...}; }
(std::make_index_sequence<kMostKeys>());
constexpr auto kSetters = []<std::size_t... I>(std::index_sequence<I...>) { return std::array{&set_value<I>...}; }
(std::make_index_sequence<kMostKeys>());

PartInfo part_of(std::size_t place, const Definition& d) {
  PartInfo part{};
  part.name = d.name;
  part.summary = d.summary;
  part.role = Role::select;
  part.foresight = Foresight::none;
  part.params = d.params;
  part.config = kConfigs[place];
  part.traits = [](const void* config) { return static_cast<const Config*>(config)->of->traits; };
  part.budgeted = [](const void*) { return true; };
  part.needs = [](const void* config) {
    return Needs{
        .prompt_queries = static_cast<const Config*>(config)->of->prompt_queries, .scores = {}, .evicted_at = {}};
  };
  part.check = [](const void*, int) {};
  part.select = [](const void* config, const SetShape& shape) {
    return make_selector(*static_cast<const Config*>(config), shape);
  };
  return part;
}

bool is_key_name(const std::string& name) {
  return !name.empty() && name[0] >= 'a' && name[0] <= 'z' &&
         name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == std::string::npos;
}

void add_key(Definition& d, const std::string& key, const py::handle& value) {
  const std::size_t i = d.params.size();
  const auto refuse = [&](const std::string& why) {
    throw ConfigError(fmt::format("{}: key '{}' {}", d.name, key, why));
  };
  if (i == kMostKeys) {
    refuse(fmt::format("is one too many; a selector takes {}", kMostKeys));
  }
  if (!is_key_name(key)) {
    refuse("is no name; it takes small letters, digits and '_', a letter first");
  }
  for (const ParamInfo& p : engine_keys()) {
    if (p.name == key) {
      refuse("is one that every selector has; give its default to register itself");
    }
  }
  ParamInfo param{.name = d.texts.emplace_back(key),
                  .type = ParamType::real,
                  .lo = -kUnbounded,
                  .hi = kUnbounded,
                  .scale = Scale::lin,
                  .choices = {},
                  .doc = "of the Python class",
                  .get = kGetters[i],
                  .set = kSetters[i]};
  ParamValue standard;
  if (py::isinstance<py::bool_>(value)) {
    param.type = ParamType::boolean;
    param.lo = 0;
    param.hi = 1;
    standard.number = value.cast<bool>() ? 1 : 0;
  } else if (py::isinstance<py::int_>(value)) {
    param.type = ParamType::integer;
    standard = checked_value(d.name, param, value.cast<double>());
  } else if (py::isinstance<py::float_>(value)) {
    standard = checked_value(d.name, param, value.cast<double>());
  } else if (py::isinstance<py::str>(value) && value.cast<std::string>().ends_with('%')) {
    param.type = ParamType::tokens;
    param.lo = 0;
    standard = parse_value(d.name, param, value.cast<std::string>());
  } else if ((py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value)) && py::len(value) > 0) {
    param.type = ParamType::choice;
    auto& choices = d.choices.emplace_back();
    for (const py::handle& choice : value) {
      if (!py::isinstance<py::str>(choice)) {
        refuse("has a choice that is no text");
      }
      choices.push_back(d.texts.emplace_back(choice.cast<std::string>()));
    }
    param.choices = choices;
  } else {
    refuse(
        fmt::format("has the default {}; it takes a bool, an int, a float, a share of the budget such as '50%', or a "
                    "tuple of texts to choose from, the default first",
                    py::repr(value).cast<std::string>()));
  }
  d.params.push_back(param);
  d.defaults.push_back(standard);
}

int read_prompt_queries(const std::string& owner, const std::variant<int, std::string>& given) {
  if (const int* n = std::get_if<int>(&given); n != nullptr && *n >= 0) {
    return *n;
  }
  if (const auto* text = std::get_if<std::string>(&given); text != nullptr && *text == "all") {
    return Needs::kAll;
  }
  throw ConfigError(owner + ": prompt_queries is a number of the prompt's last queries, 0 or more, or 'all'");
}

void set_engine_key(Definition& d, const std::string& key, const py::handle& value) {
  std::vector<std::string> valid{"params", "prompt_queries", "summary"};
  for (const ParamInfo& p : engine_keys()) {
    if (p.name == key) {
      p.set(&d.traits, parse_value(d.name, p, py::str(value).cast<std::string>()));
      return;
    }
    valid.emplace_back(p.name);
  }
  throw ConfigError(fmt::format("{}: register takes no '{}'; the nearest is '{}'", d.name, key, nearest(key, valid)));
}

std::string first_line(const py::object& doc) {
  const std::string text = doc.is_none() ? "a selector in Python" : doc.cast<std::string>();
  const std::size_t begin = std::min(text.find_first_not_of(" \n"), text.size());
  return text.substr(begin, text.find('\n', begin) - begin);
}

void register_selector(const std::string& name, const py::object& type, const py::dict& params,
                       const std::variant<int, std::string>& prompt_queries, const std::string& summary,
                       const py::kwargs& engine) {
  if (ActiveRun::get() != nullptr) {
    throw std::runtime_error(name + " cannot be registered while a run is under way");
  }
  auto d = std::make_shared<Definition>(type);
  d->name = name;
  d->summary = summary.empty() ? first_line(type.attr("__doc__")) : summary;
  const auto has = [&](const char* method) { return py::hasattr(type, method); };
  if (!has("score")) {
    throw ConfigError(name + ": the class has no method score(self, view)");
  }
  d->prefill = has("prefill");
  d->step = has("step");
  d->steps = has("steps");
  d->evicted = has("evicted");
  d->prompt_queries = read_prompt_queries(name, prompt_queries);
  for (const auto& [key, value] : engine) {
    set_engine_key(*d, key.cast<std::string>(), value);
  }
  d->params.reserve(params.size());
  for (const auto& [key, value] : params) {
    add_key(*d, py::str(key).cast<std::string>(), value);
  }

  const PartInfo* there = find_part(name);
  for (std::size_t i = 0; i < kMostSelectors; ++i) {
    Place& place = places()[i];
    if (place.definition != nullptr && there == &place.part) {  // the class was written anew
      place.part = part_of(i, *d);
      place.definition = d;
      return;
    }
    if (place.definition == nullptr) {
      place.part = part_of(i, *d);
      add_part(place.part);
      place.definition = d;
      return;
    }
  }
  throw ConfigError(
      fmt::format("{}: {} selectors are registered already, which is all there is room for", name, kMostSelectors));
}

}  // namespace

void bind_selectors(py::module_& m) {
  py::class_<SetShape>(m, "Shape", "The set that a selector is made for: the first argument of its constructor.")
      .def_readonly("layer", &SetShape::layer, "the model's own layer number")
      .def_readonly("n_model_layers", &SetShape::n_model_layers, "layers of the model, not of the run")
      .def_readonly("set", &SetShape::set, "index of the set within its layer")
      .def_readonly("kv_head", &SetShape::kv_head, "of the set's first lane")
      .def_readonly("n_lanes", &SetShape::n_lanes, "KV heads of the set")
      .def_readonly("n_heads", &SetShape::n_heads, "query heads per lane")
      .def_readonly("head_dim", &SetShape::head_dim, "width of keys and queries")
      .def_readonly("v_head_dim", &SetShape::v_head_dim, "width of values")
      .def_readonly("n_tokens", &SetShape::n_tokens, "tokens of the run: positions are below")
      .def_readonly("prompt_len", &SetShape::prompt_len, "tokens of the prompt")
      .def_readonly("budget", &SetShape::budget, "tokens per set as asked for, before any allocator")
      .def_readonly("scale", &SetShape::scale, "softmax scale, folded into View.queries")
      .def_readonly("seed", &SetShape::seed, "of the run, for random choices");

  m.def("register", &register_selector, py::arg("name"), py::arg("cls"), py::kw_only(), py::arg("params") = py::dict(),
        py::arg("prompt_queries") = 0, py::arg("summary") = "",
        R"(Makes a Python class a selector that methods can name, alone or with other parts, as "name:key=1+adakv".

One instance is made for each set (see Shape) and layer, as cls(shape, **params). Its methods:
  score(view)          -> array (n_slots,): higher stays, ties drop the older token, +inf protects. Required.
  prefill(view)        once, with the whole prompt kept (not with pool="decode")
  step(view)           every decode step, after its token was added, before anything leaves
  steps(attention, pos, now)  in place of step: the steps since the last call at once, at most 64 of them, before
                       score: attention float32 (n_batch, n_slots), 0 where a token was not there yet; pos int32
                       (n_slots,); now int32 (n_batch,). Python is entered once for many steps where interval > 1.
  evicted(view, slots) just before these slots (int32, ascending) leave

params: keys of the method's text and their defaults: bool, int, float, "50%" (tokens or a share of the budget; the
class gets tokens), or a tuple of texts to choose from. prompt_queries: how many of the prompt's last queries the class
asks views about, or "all". Further keywords are the defaults of the engine keys scope, pool, group, interval, evict and
decode. Registering a name of yours again replaces the class. ConfigError where a name is taken or a value cannot be.)");
}

}  // namespace kvreplay::python
