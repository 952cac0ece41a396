#include "tests/support/reference_compare.hpp"

#include <cmath>
#include <cstring>
#include <set>
#include <sstream>

namespace kvreplay::testing {
namespace {

double tolerance_of(const std::string& name) {
  static const std::set<std::string> exact = {"evicted_mass", "error", "error_output", "error_corrected",
                                              "error_exact_mass"};
  const bool of_layer = name.rfind("layer.", 0) == 0;
  const std::string plain = of_layer ? name.substr(6) : name;
  return exact.count(plain.substr(0, plain.find('.'))) > 0 ? kErrorTolerance : kEvictedTolerance;
}

// Whether a step lies so close to a bound of what counts that either side may leave it out.
bool at_a_bound(const NamedSeries& truth, Eigen::Index i) {
  const auto mass = truth.find("evicted_mass");
  if (mass == truth.end()) {
    return false;
  }
  const double w = mass->second.data()[i];
  return std::abs(w / kLeastEvictedMass - 1) < 1e-3 || std::abs(std::log(w) - kLeastLogMass) < 3;
}

}  // namespace

Layer engine_layer(const ToyLayer& toy) {
  const ToyOptions& o = toy.options;
  Layer layer;
  layer.index = 0;
  layer.n_model_layers = 1;
  layer.n_heads = toy.n_heads();
  layer.n_kv_heads = o.n_kv_heads;
  layer.group_size = o.group_size;
  layer.head_dim = o.head_dim;
  layer.v_head_dim = o.v_head_dim;
  layer.n_tokens = o.n_tokens;
  layer.prompt_len = o.prompt_len;
  for (const TokenSpan& span : o.spans) {  // as they are loaded: none ends beyond the tokens
    layer.spans.push_back({span.name, span.begin, std::min(span.end, o.n_tokens)});
  }
  layer.logit_softcap = static_cast<float>(o.softcap);
  layer.scale = static_cast<float>(toy.scale);
  layer.element_bytes = element_bytes(o.element);
  for (int kv = 0; kv < o.n_kv_heads; ++kv) {
    MatF q(Eigen::Index{o.n_tokens} * o.group_size, o.head_dim);
    for (Pos pos = 0; pos < o.n_tokens; ++pos) {
      for (int head = 0; head < o.group_size; ++head) {
        const MatD& of_head = toy.q[static_cast<std::size_t>(kv * o.group_size + head)];
        q.row(Eigen::Index{pos} * o.group_size + head) = (toy.scale * of_head.row(pos)).cast<float>();
      }
    }
    layer.q.push_back(std::move(q));
    layer.k.push_back(toy.k[static_cast<std::size_t>(kv)].cast<float>());
    layer.v.push_back(toy.v[static_cast<std::size_t>(kv)].cast<float>());
  }
  layer.w_o = toy.w_o.cast<float>();
  layer.rotation = Rotation{};
  for (int i = 0; i < o.head_dim / 2; ++i) {
    layer.rotation->inv_freq.push_back(std::pow(10000.0, -2.0 * i / o.head_dim));
  }
  for (Pos pos = 0; pos < o.n_tokens; ++pos) {
    layer.rotation->ids.push_back(pos);
  }
  return layer;
}

Evicted recorded_evictions(const CellResult& cell) {
  const auto n_tokens = static_cast<Eigen::Index>(cell.evicted_at.at(0).size());
  Evicted out(static_cast<Eigen::Index>(cell.evicted_at.size()), n_tokens);
  for (Eigen::Index set = 0; set < out.rows(); ++set) {
    for (Eigen::Index pos = 0; pos < n_tokens; ++pos) {
      out(set, pos) = cell.evicted_at[static_cast<std::size_t>(set)][static_cast<std::size_t>(pos)];
    }
  }
  return out;
}

NamedSeries engine_series(const CellResult& cell) {
  NamedSeries out;
  for (const kvreplay::Series& s : cell.series) {
    std::string name(info(s.metric).name);
    switch (s.metric) {
      case Metric::projected_error:
        name = "layer.error";
        break;
      case Metric::projected_error_output:
        name = "layer.error_output";
        break;
      case Metric::projected_error_corrected:
        name = "layer.error_corrected";
        break;
      default:
        break;
    }
    if (s.compensator >= 0) {
      name += "." + cell.compensators[static_cast<std::size_t>(s.compensator)];
    }
    if (!s.span.empty()) {
      name += "." + s.span;
    }
    out[name] = Eigen::Map<const MatF>(s.values.data(), s.rows, s.n_steps).cast<double>();
  }
  return out;
}

std::vector<std::string> differences(const NamedSeries& truth, const NamedSeries& found) {
  std::vector<std::string> out;
  for (const auto& [name, expected] : truth) {
    const auto it = found.find(name);
    if (it == found.end()) {
      out.push_back(name + " is missing");
      continue;
    }
    const MatD& got = it->second;
    if (got.rows() != expected.rows() || got.cols() != expected.cols()) {
      out.push_back(name + " has the wrong shape");
      continue;
    }
    const double tolerance = tolerance_of(name);
    double worst = 1;
    Eigen::Index place = -1;
    int n_wrong = 0;
    for (Eigen::Index i = 0; i < expected.size(); ++i) {
      const double a = expected.data()[i], b = got.data()[i];
      double excess = 0;  // in tolerances
      if (std::isnan(a) != std::isnan(b)) {
        excess = got.rows() > 1 && at_a_bound(truth, i) ? 0 : 1e300;
      } else if (!std::isnan(a)) {
        excess = std::abs(a - b) / (tolerance * std::max(1.0, std::abs(a)));
      }
      n_wrong += excess > 1 ? 1 : 0;
      if (!(excess <= worst)) {
        worst = excess;
        place = i;
      }
    }
    if (place >= 0) {
      std::ostringstream text;
      text.precision(9);
      text << name << ": row " << place / expected.cols() << " step " << place % expected.cols() << " should be "
           << expected.data()[place] << ", is " << got.data()[place];
      const auto mass = truth.find("evicted_mass");
      if (mass != truth.end() && mass->second.size() == expected.size()) {
        text << " (evicted mass " << mass->second.data()[place] << ")";
      }
      text << "; " << n_wrong << " of " << expected.size() << " differ";
      out.push_back(text.str());
    }
  }
  return out;
}

std::string first_bit_difference(const CellResult& a, const CellResult& b) {
  if (a.error != b.error || a.series.size() != b.series.size() || a.evicted_at != b.evicted_at) {
    return "errors, metrics or evictions differ";
  }
  for (std::size_t i = 0; i < a.series.size(); ++i) {
    const kvreplay::Series &x = a.series[i], &y = b.series[i];
    if (x.values.size() != y.values.size() ||
        std::memcmp(x.values.data(), y.values.data(), x.values.size() * sizeof(float)) != 0) {
      return std::string(info(x.metric).name) + " differs";
    }
  }
  return {};
}

}  // namespace kvreplay::testing
