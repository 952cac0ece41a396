// SALS: what is read, what it costs, and the arithmetic of its two kinds of directions.
#include "policies/sals.hpp"

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <set>

#include "policies/method.hpp"
#include "tests/support/fake_view.hpp"

using namespace kvreplay;
using test::FakeView;
using test::random_matrix;

namespace {

Rotation rotation_of(int dim, int n_tokens, bool interleaved = false) {
  Rotation r;
  r.interleaved = interleaved;
  for (int i = 0; i < dim / 2; ++i) {
    r.inv_freq.push_back(std::pow(10000.0, -2.0 * i / dim));
  }
  for (int i = 0; i < n_tokens; ++i) {
    r.ids.push_back(i);
  }
  return r;
}

// Keys of `rank` joint directions before RoPE, plus noise; values and queries of normal numbers.
struct Bench {
  Rotation rotation;
  FakeView view;
  std::vector<MatF> raw;  // per lane (n_tokens, head_dim)

  Bench(int n_tokens, int prompt_len, int dim, int n_heads, int n_lanes, int rank = 4, float noise = 0.2F,
        bool interleaved = false)
      : rotation(rotation_of(dim, n_tokens, interleaved)), view(n_tokens, prompt_len, dim, n_heads, n_lanes) {
    const MatF joint = random_matrix(n_tokens, rank, 11) * random_matrix(rank, n_lanes * dim, 12) +
                       noise * random_matrix(n_tokens, n_lanes * dim, 13);
    for (int lane = 0; lane < n_lanes; ++lane) {
      raw.push_back(joint.middleCols(lane * dim, dim));
      MatF& k = view.lanes[static_cast<std::size_t>(lane)].k;
      k = raw.back();
      for (int t = 0; t < n_tokens; ++t) {
        rotation.apply(t, {k.row(t).data(), static_cast<std::size_t>(dim)});
      }
    }
    view.budget = 1 << 20;
    view.whole_prompt();
  }

  SetShape shape(int layer = 5, int n_model_layers = 32) const {
    SetShape s = view.shape();
    s.layer = layer;
    s.n_model_layers = n_model_layers;
    s.rotation = &rotation;
    return s;
  }
  std::unique_ptr<Reader> reader(const std::string& keys, int layer = 5) const {
    const Method m = parse_method("full:scope=layer+sals_score" + keys);
    return m.read->info->read(m.read->config().get(), shape(layer));
  }
  std::unique_ptr<Rewriter> store(const std::string& keys, int layer = 5) const {
    const Method m = parse_method("full:scope=layer+sals_store" + keys);
    return m.rewrite->info->rewrite(m.rewrite->config().get(), shape(layer));
  }
  std::set<int> chosen(Reader& r, int lane = 0, int head = 0) const {
    std::vector<int> slots;
    r.choose(view, lane, head, slots);
    CHECK(std::set<int>(slots.begin(), slots.end()).size() == slots.size());
    return {slots.begin(), slots.end()};
  }
  // The n tokens outside sinks and window whose logits, summed over all heads, are largest.
  std::set<int> truly_best(int n, int sink, int window, bool positions) const {
    const int n_slots = static_cast<int>(view.pos.size());
    std::vector<std::pair<double, int>> sums;
    for (int i = sink; i < n_slots - window; ++i) {
      double sum = 0;
      for (int lane = 0; lane < view.n_lanes; ++lane) {
        const MatF q = view.queries(lane, 1);
        for (int h = 0; h < view.n_heads; ++h) {
          Eigen::VectorXf query = q.row(h);
          if (!positions) {
            rotation.undo(view.now, {query.data(), static_cast<std::size_t>(query.size())});
          }
          const auto l = static_cast<std::size_t>(lane);
          const auto key = positions ? view.lanes[l].k.row(i) : raw[l].row(i);
          sum += key.cast<double>().dot(query.cast<double>());
        }
      }
      sums.emplace_back(-sum, i);
    }
    std::sort(sums.begin(), sums.end());
    std::set<int> best;
    for (int i = 0; i < n; ++i) {
      best.insert(sums[static_cast<std::size_t>(i)].second);
    }
    return best;
  }
  double recall(const std::string& keys, int steps, bool positions) {
    auto r = reader(":sink=0,window=0,budget=20" + keys);
    r->prefill(view);
    double hits = 0;
    for (int s = 0; s < steps; ++s) {
      view.append();
      const std::set<int> found = chosen(*r);
      for (const int i : truly_best(20, 0, 0, positions)) {
        hits += static_cast<double>(found.count(i));
      }
    }
    return hits / (20.0 * steps);
  }
};

}  // namespace

TEST_CASE("at full rank the shared score is the sum of logits before RoPE, the exact one that after", "[sals]") {
  const bool interleaved = GENERATE(false, true);
  CHECK(Bench(150, 100, 16, 2, 3, 4, 0.2F, interleaved).recall(",rank=1,scoring_rank=1", 20, false) == 1);
  CHECK(Bench(150, 100, 16, 2, 3, 4, 0.2F, interleaved).recall(",rank=1,scoring_rank=1,score=exact", 20, true) == 1);
  // The two do not agree with each other.
  CHECK(Bench(150, 100, 16, 2, 3).recall(",rank=1,scoring_rank=1", 20, true) < 0.9);
}

TEST_CASE("more directions overlap more with the true choice", "[sals]") {
  // Eight directions hold nearly all energy of 48: a sixth of the numbers finds what all of them find.
  const auto recall = [](const std::string& keys) {
    return Bench(200, 140, 16, 1, 3, 8, 0.1F).recall(keys, 40, false);
  };
  const double few = recall(",rank=0.1667,scoring_rank=0.5"), all = recall(",rank=0.1667,scoring_rank=1");
  CHECK(all > 0.9);
  CHECK(all > few);
  CHECK(recall(",rank=1,scoring_rank=1") == 1);
}

TEST_CASE("directions hold the energy that their eigenvalues say, and more than heads by themselves", "[sals]") {
  const Bench b(120, 120, 16, 1, 3);
  std::vector<int> slots(120);
  std::iota(slots.begin(), slots.end(), 0);
  const MatF x = joint_keys(b.view, slots, &b.rotation);
  const Eigen::MatrixXd c = x.cast<double>().transpose() * x.cast<double>();
  const Eigen::VectorXd energy = Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>(c).eigenvalues().reverse();
  for (const int rank : {1, 3, 6, 48}) {
    const MatF u = leading_directions(x, rank);
    REQUIRE(u.cols() == rank);
    CHECK((u.transpose() * u - MatF::Identity(rank, rank)).norm() < 1e-5F);
    const double held = (x * u).cast<double>().squaredNorm();
    CHECK(held / x.cast<double>().squaredNorm() == Approx(energy.head(rank).sum() / energy.sum()).epsilon(1e-5));
    if (rank % 3 == 0) {
      double apart = 0;
      for (int head = 0; head < 3; ++head) {
        const MatF one = x.middleCols(16 * head, 16);
        apart += (one * leading_directions(one, rank / 3)).cast<double>().squaredNorm();
      }
      CHECK(held >= apart * (1 - 1e-6));
    }
  }
  // Fewer tokens than numbers, and only as many directions as there are tokens.
  CHECK(leading_directions(x.topRows(5), 48).cols() == 5);
  CHECK(leading_directions(MatF(x.row(0).replicate(9, 1)), 48).cols() == 1);
  CHECK((leading_directions(x.topRows(5), 3).transpose() * leading_directions(MatF(x.topRows(5).replicate(20, 1)), 3))
            .cwiseAbs()
            .isApprox(MatF::Identity(3, 3), 1e-4F));
}

TEST_CASE("sinks and window are always read and never compete", "[sals]") {
  Bench b(200, 150, 16, 2, 2);
  auto reader = b.reader(":budget=100,rank=1,scoring_rank=1");
  reader->prefill(b.view);
  b.view.append();
  const std::set<int> read = b.chosen(*reader);
  CHECK(read.size() == 100);
  std::set<int> expected = b.truly_best(20, 16, 64, false);
  for (int i = 0; i < 16; ++i) {
    expected.insert(i);
  }
  for (int i = 151 - 64; i < 151; ++i) {
    expected.insert(i);
  }
  CHECK(read == expected);
  CHECK(b.chosen(*reader, 1, 1) == read);  // one choice for the layer
}

TEST_CASE("all is read of a short text, and in the first and last layers", "[sals]") {
  Bench b(200, 78, 16, 2, 2);
  auto reader = b.reader(":budget=80");
  reader->prefill(b.view);
  for (int i = 0; i < 2; ++i) {
    b.view.append();
    CHECK(b.chosen(*reader).size() == b.view.pos.size());
    CHECK(reader->scoring_bytes(static_cast<int>(b.view.pos.size())) == 0);
  }
  b.view.append();
  CHECK(b.chosen(*reader).size() == 80);
  CHECK(reader->scoring_bytes(81) > 0);
  for (const int layer : {0, 1, 2, 30, 31}) {
    INFO("layer " << layer);
    auto one = b.reader(":budget=20", layer);
    one->prefill(b.view);
    CHECK(b.chosen(*one).size() == (layer == 2 || layer == 30 ? 20U : 81U));
    CHECK((one->metadata_bytes(81) > 0) == (layer == 2 || layer == 30));
  }
}

TEST_CASE("a budget of one reads one token", "[sals]") {
  for (const std::string keys : {"", ":score=exact", ":sink=0,window=0", ":sink=0,window=1", ":rank=0"}) {
    Bench one(40, 20, 16, 2, 2);
    one.view.budget = 1;
    auto reader = one.reader(keys);
    reader->prefill(one.view);
    one.view.append();
    CHECK(one.chosen(*reader).size() == 1);
  }
}

TEST_CASE("what sals stores: the published ratios need groups of 32", "[sals]") {
  const auto ratio = [](const std::string& keys) {
    Bench b(300, 300, 128, 1, 2, 4, 1.0F);
    b.store(keys)->step(b.view);
    return b.view.bytes(0, 0) / (2 * 128 * 2);
  };
  CHECK(ratio("") == 0.28125);
  CHECK(ratio(":rank=0.125,bits=2") == 1 / 6.4);
  CHECK(ratio(":group=64") == Approx(.2656).margin(5e-5));
  CHECK(ratio(":group=64,rank=0.125,bits=2") == Approx(.1406).margin(5e-5));
  CHECK(ratio(":group=128") == Approx(.2578).margin(5e-5));
  CHECK(ratio(":group=128,rank=0.125,bits=2") == Approx(.1328).margin(5e-5));
  CHECK(ratio(":along=tokens") == 0.28125);
}

TEST_CASE("what sals reads: the published fractions, and the constants beside them", "[sals]") {
  // An eighth of the tokens; 2 s D numbers are read by dense attention. Elements moved: s r* + 2 k r.
  const auto fraction = [](double share, int bits) {
    constexpr int kTokens = 4096, kDim = 128, kLanes = 2;
    const int k = kTokens / 8;
    const double rank = share * kDim * kLanes;
    const double value_constants = k * kDim * kLanes / 32.0 * 4;
    Bench b(kTokens, kTokens - 1, kDim, 1, kLanes, 4, 1.0F);
    const std::string r = "rank=" + std::to_string(share);
    auto reader = b.reader(":sink=0,window=0,own_latent=false,budget=" + std::to_string(k) + "," + r);
    reader->prefill(b.view);
    b.store(":residual=1," + r + ",bits=" + std::to_string(bits))->step(b.view);
    b.view.append();
    const double slot = b.view.bytes(0, 0) * kLanes;
    CHECK(b.chosen(*reader).size() == static_cast<std::size_t>(k));
    const double scored = reader->scoring_bytes(kTokens) * kLanes;
    CHECK(scored == kTokens * rank / 2 * 2);
    return (scored + k * slot - value_constants) / (2.0 * kTokens * kDim * kLanes * 2);
  };
  CHECK(fraction(0.25, 4) == 0.09375);
  CHECK(fraction(0.125, 2) == 0.046875);
}

TEST_CASE("sals rebuilds keys that lie in its directions, and leaves the latest exact", "[sals]") {
  Bench b(160, 150, 16, 1, 3, 8, 0);
  auto store = b.store(":rank=0.1667,bits=8,residual=10");
  const auto errors = [&] {
    Eigen::Array2d e(0, 0);
    for (int i = 0; i < static_cast<int>(b.view.pos.size()); ++i) {
      for (int lane = 0; lane < 3; ++lane) {
        const auto& l = b.view.lanes[static_cast<std::size_t>(lane)];
        e[0] = std::max(e[0], static_cast<double>((b.view.key(lane, i).transpose() - l.k.row(i)).norm()));
        e[1] = std::max(e[1], static_cast<double>((b.view.value(lane, i).transpose() - l.v.row(i)).norm()));
      }
    }
    return e;
  };
  store->step(b.view);
  CHECK(errors()[0] < 1e-4);
  CHECK(errors()[1] < 0.1);
  CHECK(b.view.bytes(0, 139) < b.view.bytes(0, 140));
  CHECK(b.view.value(0, 140).transpose() == b.view.lanes[0].v.row(140));
  b.view.append();
  store->step(b.view);
  CHECK(b.view.value(0, 140).transpose() != b.view.lanes[0].v.row(140));
  CHECK(b.view.value(0, 141).transpose() == b.view.lanes[0].v.row(141));

  Bench halves(150, 150, 16, 1, 3);
  halves.store(":what=keys,rank=0.1")->step(halves.view);
  CHECK(halves.view.value(1, 3).transpose() == halves.view.lanes[1].v.row(3));
  CHECK(halves.view.key(1, 3).transpose() != halves.view.lanes[1].k.row(3));
  halves.store(":what=values", 31)->step(halves.view);
  CHECK(halves.view.value(1, 3).transpose() == halves.view.lanes[1].v.row(3));  // the last layer is dense
}

TEST_CASE("the choice does not change where the keys it is made by are rebuilt from the same latent", "[sals]") {
  Bench plain(160, 150, 16, 2, 2, 6, 0.5F), stored(160, 150, 16, 2, 2, 6, 0.5F);
  const std::string keys = ":sink=2,window=4,budget=30";
  auto a = plain.reader(keys), b = stored.reader(keys);
  a->prefill(plain.view);
  b->prefill(stored.view);
  auto store = stored.store(":residual=4");
  store->step(stored.view);
  for (int i = 0; i < 5; ++i) {
    plain.view.append();
    stored.view.append();
    CHECK(plain.chosen(*a) == stored.chosen(*b));
    store->step(stored.view);
  }
}

TEST_CASE("a complex direction holds at least as much as a real one, and that as much as a chosen pair", "[sals]") {
  // Energies of one frequency's pairs of three heads: Hermitian, its real part, its diagonal.
  const MatF x = random_matrix(200, 3, 1), noise = random_matrix(200, 3, 2);
  Eigen::MatrixXcd z(200, 3);
  z.real() = x.cast<double>();
  z.imag() = (x * random_matrix(3, 3, 3) + 0.3F * noise).cast<double>();
  const Eigen::MatrixXcd sigma = z.transpose() * z.conjugate();
  const auto best = [](const auto& m) { return m.eigenvalues().reverse().eval(); };
  const Eigen::VectorXd complex = best(Eigen::SelfAdjointEigenSolver<Eigen::MatrixXcd>(sigma));
  const Eigen::VectorXd real = best(Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>(Eigen::MatrixXd(sigma.real())));
  Eigen::VectorXd pair = sigma.diagonal().real();
  std::sort(pair.begin(), pair.end(), std::greater<>());
  for (int n = 1; n <= 3; ++n) {
    CHECK(complex.head(n).sum() >= real.head(n).sum() * (1 - 1e-12));
    CHECK(real.head(n).sum() >= pair.head(n).sum() * (1 - 1e-12));
  }
}

TEST_CASE("directions found elsewhere come from a file", "[sals]") {
  const std::string folder = std::filesystem::temp_directory_path() / "kvreplay_sals_test";
  std::filesystem::create_directories(folder);
  Bench b(120, 100, 16, 2, 2);
  std::vector<int> slots(100);
  std::iota(slots.begin(), slots.end(), 0);
  const MatF u = leading_directions(joint_keys(b.view, slots, &b.rotation), 16);
  const auto write = [&](const std::string& name, const std::string& header, const MatF& numbers) {
    std::ofstream file(folder + "/" + name, std::ios::binary);
    file << "\x93NUMPY" << '\x01' << '\0' << static_cast<char>(header.size()) << '\0' << header;
    file.write(reinterpret_cast<const char*>(numbers.data()), 4 * numbers.size());
  };
  const std::string kind = "{'descr': '<f4', 'fortran_order': False, 'shape': ";
  write("u5.npy", kind + "(32, 16), }\n", u);
  const std::string keys = ":sink=2,window=3,budget=20,rank=0.5";
  auto own = b.reader(keys), given = b.reader(keys + ",calibration=" + folder + "/u{layer}.npy");
  own->prefill(b.view);
  given->prefill(b.view);
  for (int i = 0; i < 5; ++i) {
    b.view.append();
    CHECK(b.chosen(*own) == b.chosen(*given));
  }
  CHECK_NOTHROW(b.store(":calibration=" + folder + "/u{layer}.npy")->step(b.view));
  CHECK_THROWS_WITH(b.reader(keys + ",calibration=" + folder + "/none.npy"), Catch::Contains("cannot be read"));
  CHECK_THROWS_WITH(b.store(":rank=1,calibration=" + folder + "/u5.npy"), Catch::Contains("at least 32 columns"));
  write("bent.npy", kind + "(32, 16), }\n", 2 * u);
  CHECK_THROWS_WITH(b.store(":calibration=" + folder + "/bent.npy"), Catch::Contains("orthonormal"));
  write("short.npy", kind + "(32, 160), }\n", u);
  CHECK_THROWS_WITH(b.store(":calibration=" + folder + "/short.npy"), Catch::Contains("ends before"));
  write("line.npy", kind + "(512,), }\n", u);
  CHECK_THROWS_WITH(b.store(":calibration=" + folder + "/line.npy"), Catch::Contains("has the shape [512]"));
  write("turned.npy", "{'descr': '<f4', 'fortran_order': True, 'shape': (32, 16), }\n", u);
  CHECK_THROWS_WITH(b.store(":calibration=" + folder + "/turned.npy"), Catch::Contains("C order"));
  std::filesystem::remove_all(folder);
}

TEST_CASE("sals is a preset of its two halves", "[sals]") {
  const Method m = parse_method("sals");
  CHECK(m.name == "full:scope=layer+sals_score:own_latent=false+sals_store");
  CHECK(m.needs().pre_rope);
  CHECK(m.budgeted());
  CHECK_NOTHROW(m.check(1));
  CHECK_THROWS_WITH(parse_method("sals:sink=30").check(20), Catch::Contains("sink=30"));
  CHECK_THROWS_WITH(parse_method("sals:scope=kv_head"), Catch::Contains("write scope=layer"));
  CHECK_NOTHROW(parse_method("sals:sals_score.rank=0.125,sals_store.rank=0.125,bits=2"));
}
