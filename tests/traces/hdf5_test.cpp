#include "traces/hdf5.hpp"

#include <catch2/catch.hpp>
#include <limits>

#include "tests/traces/fixtures.hpp"

namespace kvreplay::hdf5 {

using test::TemporaryFolder;

TEST_CASE("columns, arrays and attributes come back as they were written") {
  const TemporaryFolder folder;
  const auto path = folder / "a.h5";
  const std::vector<std::string> texts = {"", "ä", "longer text"};
  const std::vector<std::int32_t> ints = {1, -2, 3};
  const std::vector<std::int64_t> longs = {std::int64_t{1} << 40, -5};
  const std::vector<double> reals = {0.5, -1e300};
  {
    File file = File::create(path);
    const Group group = file.root().create_group("cells");
    group.write_column("text", std::span<const std::string>(texts));
    group.write_column("int", std::span<const std::int32_t>(ints));
    group.write_column("long", std::span<const std::int64_t>(longs));
    group.write_column("real", std::span<const double>(reals));
    group.write_column("none", std::span<const double>());
    group.set("name", "kv");
    group.set("empty", "");
    group.set("n", 7);
    group.set("x", 0.25);
    group.set("list", std::span<const std::int32_t>(ints));
    group.set("n", 8);
    group.set("name", "a longer name");
    const Dataset blocks = group.create("blocks", Type::f64, {2, 5, 3}, {.chunk = {1, 2, 3}, .deflate = 4});
    const std::vector<double> row = {1, 2, 3, 4, 5, 6};
    blocks.write_block({1, 2, 0}, {1, 2, 3}, bytes_of(row));
    CHECK_FALSE(std::filesystem::exists(path));
    file.publish();
  }
  CHECK(std::filesystem::exists(path));
  CHECK_FALSE(std::filesystem::exists(File::part_of(path)));

  const File file = File::open(path);
  const Group group = file.root().group("cells");
  CHECK(group.children() == std::vector<std::string>{"blocks", "int", "long", "none", "real", "text"});
  CHECK(group.dataset("text").read_texts() == texts);
  CHECK(group.dataset("int").read_integers() == std::vector<std::int64_t>{1, -2, 3});
  CHECK(group.dataset("long").read_integers() == longs);
  CHECK(group.dataset("real").read_reals() == reals);
  CHECK(group.dataset("none").read_reals().empty());
  CHECK(group.text("name") == "a longer name");
  CHECK(group.text("empty").empty());
  CHECK(group.integer("n") == 8);
  CHECK(group.real("x") == 0.25);
  CHECK(group.integers("list") == std::vector<std::int64_t>{1, -2, 3});
  CHECK(group.attribute_names() == std::vector<std::string>{"empty", "list", "n", "name", "x"});
  std::vector<double> block(6);
  group.dataset("blocks").read_block({1, 1, 0}, {1, 2, 3}, writable_bytes_of(block));
  CHECK(block == std::vector<double>{0, 0, 0, 1, 2, 3});
  CHECK(group.dataset("blocks").storage().deflate);
}

TEST_CASE("failures are one typed sentence with file and object") {
  const TemporaryFolder folder;
  const auto path = folder / "a.h5";
  File created = File::create(path);
  const std::vector<double> reals = {1, 2};
  created.root().write_column("real", std::span<const double>(reals));
  created.root().set("name", "x");
  const std::vector<std::int32_t> ints = {1, 2};
  created.root().set("list", std::span<const std::int32_t>(ints));
  created.publish();
  const File file = File::open(path);
  const Group& root = file.root();
  CHECK_THROWS_WITH(root.dataset("reel"), "a.h5: /reel is missing (a dataset is expected)");
  CHECK_THROWS_WITH(root.group("real"), "a.h5: /real must be a group");
  CHECK_THROWS_WITH(root.dataset("real").read_integers(), "a.h5: /real must hold integers, but holds float64");
  CHECK_THROWS_WITH(root.text("nome"), "a.h5: / lacks the attribute 'nome'");
  CHECK_THROWS_WITH(root.integer("name"), "a.h5: /@name must be of an integer type");
  CHECK_THROWS_WITH(root.integer("list"), "a.h5: /@list must be one integer, but holds 2");
  CHECK_THROWS_AS(root.create_group("g"), StorageError);  // opened for reading
  CHECK_THROWS_AS(File::open(folder / "no.h5"), StorageError);
  CHECK_THROWS_AS(File::create(folder / "no/a.h5"), StorageError);
  std::vector<double> block(2);
  CHECK_THROWS_AS(root.dataset("real").read_block({1}, {2}, writable_bytes_of(block)), StorageError);
  CHECK_THROWS_AS(root.dataset("real").read_block({0}, {1}, writable_bytes_of(block)), StorageError);
}

TEST_CASE("reading takes no lock: a file that is open for writing can be read") {
  const TemporaryFolder folder;
  const auto path = folder / "a.h5";
  File created = File::create(path);
  created.root().set("n", 1);
  created.publish();
  const File writing = File::open_write(path);
  CHECK(File::open(path).root().integer("n") == 1);
}

TEST_CASE("discard removes what was not published") {
  const TemporaryFolder folder;
  File file = File::create(folder / "a.h5");
  file.discard();
  CHECK_FALSE(std::filesystem::exists(File::part_of(folder / "a.h5")));
}

}  // namespace kvreplay::hdf5
