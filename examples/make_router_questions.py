"""Writes `examples/data/router-places.jsonl`: questions over many places of every country, for the router to learn from.

    python examples/make_router_questions.py

Every place is asked about in sentences drawn from the same list, so that what tells countries apart is the place alone; some name it early
in a longer text. The 60 cities of `routing.jsonl` are not in the list: half of them occur in `router-train.jsonl`, the other half nowhere,
and stay unseen.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

# Cities, regions, rivers and landmarks.
PLACES = {
    "United States": (
        "Houston, Dallas, Miami, Atlanta, Phoenix, Las Vegas, Minneapolis, Portland, San Diego, Washington, Pittsburgh, Nashville, "
        "California, Alaska, Ohio, Louisiana, Alabama, Oregon, Kentucky, Virginia, Manhattan, Brooklyn, Hollywood, Utah, Wisconsin, "
        "Tennessee, Colorado, Milwaukee, Cleveland, Baltimore, San Antonio, Sacramento, Nebraska, Maine, the Rocky Mountains"
    ),
    "China": (
        "Suzhou, Xiamen, Qingdao, Dalian, Kunming, Guiyang, Zhengzhou, Shenyang, Hefei, Changsha, Nanning, Urumqi, Lhasa, Tibet, "
        "Xinjiang, Zhejiang, Jiangsu, Hubei, Guizhou, Hainan, Inner Mongolia, Gansu, Jilin, Macau, Hong Kong, Ningbo, Foshan, "
        "the Yellow River, the Great Wall, Luoyang, Shanxi, Kashgar, the Forbidden City"
    ),
    "India": (
        "Ahmedabad, Surat, Nagpur, Indore, Bhopal, Patna, Kochi, Mysore, Chandigarh, Udaipur, Jodhpur, Agra, Coimbatore, "
        "Maharashtra, Gujarat, Tamil Nadu, Karnataka, Uttar Pradesh, Odisha, West Bengal, Kashmir, Srinagar, Ladakh, Sikkim, "
        "Rishikesh, Bengaluru, Calcutta, Andhra Pradesh, Telangana, Haryana, Darjeeling, Pondicherry, Thiruvananthapuram"
    ),
    "Japan": (
        "Kanazawa, Niigata, Kumamoto, Kagoshima, Okayama, Matsuyama, Takayama, Nikko, Kamakura, Aomori, Akita, Nagano, Gifu, "
        "Shizuoka, Kyushu, Honshu, Tohoku, Kansai, Hakodate, Saitama, Chiba, Kawasaki, Naha, Shibuya, Ginza, Akihabara, Asakusa, "
        "Miyajima, Wakayama, Toyama, Ibaraki, Kitakyushu"
    ),
    "Turkey": (
        "Mersin, Samsun, Eskisehir, Malatya, Erzurum, Denizli, Sanliurfa, Hatay, Antakya, Canakkale, Marmaris, Fethiye, Mardin, "
        "Kars, Rize, Sivas, Manisa, Pamukkale, Ephesus, the Bosphorus, Uskudar, Kadikoy, Beyoglu, Thrace, the Aegean coast of Anatolia, "
        "Alanya, Göreme, Kocaeli, Safranbolu, Kusadasi"
    ),
    "Vietnam": (
        "Ho Chi Minh City, Vung Tau, Quy Nhon, Buon Ma Thuot, Ninh Binh, Nam Dinh, Thanh Hoa, Vinh, Bien Hoa, Pleiku, Dien Bien Phu, "
        "Lao Cai, Ha Giang, Phan Thiet, My Tho, Ben Tre, Soc Trang, Quang Nam, Nghe An, Tay Ninh, Con Dao, Cao Bang, Bac Ninh, "
        "Dong Thap, Quang Ninh, Kon Tum, Long Xuyen, Annam, Tonkin"
    ),
    "Russia": (
        "Omsk, Samara, Chelyabinsk, Ufa, Krasnoyarsk, Perm, Voronezh, Saratov, Krasnodar, Tomsk, Irkutsk, Arkhangelsk, Kaliningrad, "
        "Tula, Yaroslavl, Smolensk, Nizhny Novgorod, Khabarovsk, Kamchatka, Sakhalin, Tatarstan, Dagestan, Chechnya, the Urals, "
        "Karelia, Norilsk, Astrakhan, Pskov, Suzdal, Magadan, Ryazan, the Kremlin, Bashkortostan"
    ),
    "Brazil": (
        "Goiânia, Maceió, João Pessoa, Teresina, São Luís, Aracaju, Cuiabá, Campo Grande, Campinas, Santos, Ouro Preto, Paraty, "
        "Pernambuco, Ceará, Paraná, Santa Catarina, Mato Grosso, Goiás, Pará, Amazonas, Ipanema, the Pantanal, Blumenau, Londrina, "
        "Olinda, Rondônia, Acre, Maranhão, Espírito Santo, Petrópolis, Roraima"
    ),
    "South Africa": (
        "East London, Pietermaritzburg, Kimberley, Polokwane, Nelspruit, Rustenburg, Knysna, Gauteng, Mpumalanga, the Western Cape, "
        "the Northern Cape, the Free State, the Transvaal, Sandton, Khayelitsha, Centurion, Hermanus, Paarl, "
        "the Drakensberg, Upington, Mthatha, Grahamstown, Vereeniging, Richards Bay, the Highveld, Zululand, "
        "Constantia, Ladysmith, Germiston"
    ),
    "Germany": (
        "Hanover, Düsseldorf, Essen, Duisburg, Bonn, Mannheim, Karlsruhe, Augsburg, Freiburg, Heidelberg, Rostock, Kiel, Lübeck, Mainz, "
        "Kassel, Erfurt, Weimar, Potsdam, Bavaria, Hesse, Westphalia, Lower Saxony, the Ruhr, the Harz, Franconia, Schleswig-Holstein, "
        "Münster, Regensburg, Würzburg, Ulm, Bayreuth, the Moselle, Swabia"
    ),
    "France": (
        "Strasbourg, Montpellier, Rennes, Grenoble, Dijon, Reims, Le Havre, Rouen, Avignon, Cannes, Angers, Clermont-Ferrand, Metz, "
        "Limoges, Perpignan, Savoy, Champagne, Aquitaine, Auvergne, Languedoc, Lorraine, the Dordogne, the Riviera, Versailles, "
        "Montmartre, Calais, Tours, Biarritz, Aix-en-Provence, the Seine, Picardy, Chamonix, Carcassonne"
    ),
    "Italy": (
        "Bari, Catania, Padua, Parma, Modena, Perugia, Pisa, Lucca, Ravenna, Rimini, Cagliari, Bergamo, Brescia, Messina, Lecce, Matera, "
        "Lombardy, Piedmont, Veneto, Liguria, Umbria, Emilia-Romagna, Sardinia, Abruzzo, Campania, Basilicata, Capri, Pompeii, Trento, "
        "Mantua, Assisi, the Tiber, Ferrara, Sorrento"
    ),
    "Spain": (
        "Málaga, Córdoba, Murcia, Alicante, Salamanca, Valladolid, San Sebastián, Santander, Oviedo, Gijón, Vigo, León, Burgos, Segovia, "
        "Ávila, Cáceres, Badajoz, Ibiza, Tenerife, Gran Canaria, Catalonia, Galicia, Aragon, Navarre, La Rioja, Castile, Girona, "
        "Tarragona, Marbella, Ronda, Almería, Huelva, the Ebro, the Basque Country"
    ),
    "Mexico": (
        "Cancún, Acapulco, Querétaro, San Luis Potosí, Zacatecas, Morelia, Toluca, Cuernavaca, Chihuahua, Hermosillo, "
        "Culiacán, Mazatlán, Durango, Tampico, Villahermosa, Campeche, Taxco, Sonora, Sinaloa, Nuevo León, Tabasco, Guerrero, Hidalgo, "
        "Tlaxcala, Coyoacán, Xochimilco, Teotihuacan, Puerto Vallarta, Baja California, Ciudad Juárez, San Cristóbal de las Casas"
    ),
    "Egypt": (
        "Mansoura, Tanta, Asyut, Sohag, Qena, Minya, Ismailia, Damietta, Rosetta, Zagazig, Beni Suef, Fayoum, Sharm el-Sheikh, Dahab, "
        "Marsa Matruh, El Alamein, Heliopolis, Zamalek, Maadi, Abu Simbel, Edfu, Kom Ombo, Saqqara, "
        "the Valley of the Kings, the Sphinx, Karnak, Faiyum, Kafr el-Sheikh"
    ),
    "Kenya": (
        "Thika, Nyeri, Meru, Embu, Kitale, Garissa, Kakamega, Naivasha, Nanyuki, Kilifi, Diani, Watamu, Isiolo, Marsabit, Lodwar, Bungoma, "
        "Busia, Kitui, Narok, Kajiado, the Rift Valley, Amboseli, Tsavo, Lake Turkana, Westlands, Karen near Nairobi, Voi, Homa Bay, "
        "Nyahururu, Muranga"
    ),
    "Nigeria": (
        "Abeokuta, Ilorin, Maiduguri, Zaria, Sokoto, Aba, Owerri, Warri, Asaba, Uyo, Akure, Osogbo, Ado Ekiti, Lokoja, Minna, "
        "Makurdi, Bauchi, Katsina, Yola, Ikeja, Lekki, Nsukka, Anambra, Ogun, Oyo, Borno, Rivers State, Akwa Ibom, Delta State, Edo, Imo, "
        "Plateau State"
    ),
    "Indonesia": (
        "Malang, Palembang, Pontianak, Balikpapan, Manado, Ambon, Kupang, Denpasar, Ubud, Bogor, Depok, Cirebon, Jambi, Pekanbaru, "
        "Sulawesi, Borneo and Kalimantan, Papua, Timor, Sumba, Nias, Madura, Banten, Lampung, Riau, Komodo, Krakatoa, Surakarta, Jayapura, "
        "Bukittinggi, Lake Toba, Mataram, Samarinda"
    ),
    "Philippines": (
        "Makati, Pasig, Taguig, Zamboanga, Cagayan de Oro, Bacolod, General Santos, Tacloban, Dumaguete, Legazpi, Naga, Laoag, Dagupan, "
        "Angeles, Olongapo, Puerto Princesa, Luzon, Leyte, Samar, Bohol, Negros, Panay, Bicol, Bulacan, Cavite, Laguna, Ilocos, "
        "Intramuros, Coron, Camiguin, Tarlac, Mindoro"
    ),
    "Thailand": (
        "Khon Kaen, Nakhon Ratchasima, Korat, Ubon Ratchathani, Pattaya, Hua Hin, Sukhothai, Lampang, Lamphun, Nan, Pai, Mae Hong Son, "
        "Kanchanaburi, Rayong, Trang, Nakhon Si Thammarat, Songkhla, Yala, Chonburi, Phitsanulok, Loei, Koh Phangan, Koh Tao, Koh Chang, "
        "Lopburi, Nong Khai, Buriram, Sukhumvit, Thonburi, the Chao Phraya"
    ),
}
PEOPLE = {  # how its people and their things are called: of the country, and of peoples and languages within it
    "United States": "American, Californian, Hawaiian, Texan, Cajun, Cherokee",
    "China": "Chinese, Cantonese, Mandarin, Uyghur, Hakka, Tibetan",
    "India": "Indian, Hindi, Punjabi, Tamil, Bengali, Marathi, Telugu, Malayali",
    "Japan": "Japanese, Okinawan, Ainu",
    "Turkey": "Turkish, Ottoman, Anatolian",
    "Vietnam": "Vietnamese, Tay, Kinh",
    "Russia": "Russian, Siberian, Cossack, Tatar",
    "Brazil": "Brazilian, Bahian, Carioca, Gaúcho",
    "South Africa": "South African, Zulu, Xhosa, Afrikaner, Sotho, Cape Malay",
    "Germany": "German, Bavarian, Prussian, Saxon",
    "France": "French, Breton, Parisian, Alsatian",
    "Italy": "Italian, Sicilian, Tuscan, Venetian",
    "Spain": "Spanish, Catalan, Andalusian, Galician, Basque, Castilian",
    "Mexico": "Mexican, Aztec, Nahuatl, Zapotec, Yucatecan",
    "Egypt": "Egyptian, Coptic, Nubian, pharaonic",
    "Kenya": "Kenyan, Kikuyu, Maasai, Luo, Kalenjin, Samburu",
    "Nigeria": "Nigerian, Yoruba, Igbo, Hausa, Ijaw, Tiv",
    "Indonesia": "Indonesian, Javanese, Sundanese, Balinese, Batak, Acehnese",
    "Philippines": "Filipino, Tagalog, Ilocano, Visayan, Kapampangan",
    "Thailand": "Thai, Siamese, Isan, Lanna",
}
COUNTRY = {"United States": "the United States", "Philippines": "the Philippines"}

ABOUT = (  # a place, with nothing beside it that only some countries have
    "My train gets to {} late and I am hungry; is anything open at night?",
    "Is a cake usual for a birthday in {}, or something else?",
    "If I only had one day in {}, where should I go?",
    "I come from {}. What should I cook for my neighbours?",
    "I will study in {} next term, can you describe a typical Saturday?",
    "Name a snack that I can buy from a cart in {}.",
    "My aunt lives near {} and gave me a present. How do I thank her?",
    "What does a wedding in {} look like?",
    "Where do visitors to {} leave their shoes?",
    "In {}, is it polite to arrive late?",
    "What would you wear in {} in January?",
    "When I enter a shop in {}, who says hello first?",
    "Which song does everyone in {} know?",
    "Give me a shopping list for a market day around {}.",
    "Tell me about a holiday that is kept in {}.",
    "I want to cook something hot and simple from {} tonight.",
    "Is the bus or the car the better choice in {} at rush hour?",
    "{} is where I grew up; what would my grandmother have told me about luck?",
    "Someone from {} will taste my cooking, and I am nervous. Any advice?",
    "It is six o'clock in {} and the office closes. What happens next?",
    "When do children in {} start school?",
    "What happens in {} when a baby is born?",
)
OF = (  # a people, or a language
    "What does {} food taste like?",
    "We are invited to a {} wedding and have no idea what to expect.",
    "Can you put together a {} breakfast for four?",
    "Which {} song does everybody know?",
    "How do I greet my {} neighbours?",
    "What do {} parents teach their children?",
    "Tell me about a {} custom that guests should know.",
    "My friend is {}; which present would be right?",
    "How is New Year kept in a {} home?",
    "What do {} grandmothers cook on Sundays?",
)
LONG = (  # names it once, and goes on
    "My sister moved to {} last year, and when we spoke yesterday she told me about her new flat, her work and the people next door. She "
    "has invited me for two weeks, and I would like to bring something that her friends will like. What would be a good present?",
    "I have been reading about {} for a report at school, which has to be two pages long, with a picture, and I still do not know how to "
    "begin. Could you tell me how a normal day of a family looks, from the morning to the evening?",
    "We met at a conference, and he told us of his childhood in {}. Since then we have written to each other about books, work and the "
    "weather, and next month he will be our guest. What should we cook on the first evening?",
)


def rows() -> list[dict[str, str]]:
    """The questions; the same at every call."""
    draw = random.Random(0)
    found = []
    for culture in PLACES:
        for place in PLACES[culture].split(", "):
            found += [_row(frame, place, culture) for frame in draw.sample(ABOUT, 3)]
            if draw.random() < 0.2:
                found.append(_row(draw.choice(LONG), place, culture))
        own, *peoples = PEOPLE[culture].split(", ")
        for people in peoples:
            found += [_row(frame, people, culture) for frame in draw.sample(OF, 3)]
        found += [_row(frame, own, culture, own=True) for frame in draw.sample(OF, 3)]
        country = COUNTRY.get(culture, culture)
        found += [_row(frame, country, culture, own=True) for frame in (*draw.sample(ABOUT, 5), draw.choice(LONG))]
    return found


def long_rows() -> list[dict[str, str | None]]:
    """Longer requests for the gate: several neutral questions in a row, and the same with one among them that concerns culture."""
    draw = random.Random(1)
    data = Path(__file__).parent / "data"
    neutral = [row["question"] for row in _lines(data / "neutral.jsonl") if row["split"] == "train"]
    custom = [row["question"] for row in _lines(data / "router-train.jsonl") if row["culture"] == "*"]
    found: list[dict[str, str | None]] = []
    for index in range(100):
        some = draw.sample(neutral, draw.randint(2, 16))
        if index % 2:
            some.insert(draw.randrange(len(some) + 1), draw.choice(custom))
        found.append({"question": " ".join(some), "culture": "*" if index % 2 else None})
    return found


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _row(frame: str, name: str, culture: str, own: bool = False) -> dict[str, str]:
    """One line. `own`: the name is the culture's own, and no place that could be held out."""
    question = frame.format(name)
    row = {"question": question[0].upper() + question[1:], "culture": culture}
    return row if own else {**row, "place": name}


def main() -> None:
    path = Path(__file__).parent / "data" / "router-places.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in [*rows(), *long_rows()]]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} questions")


if __name__ == "__main__":
    main()
